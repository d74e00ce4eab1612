"""The guard that keeps tests from the network works: in this process, in every child process, and for whoever swallows errors."""

import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, command_environment, take_requests
from ..server.comfy_server import ComfyServer
from ..server.hosts import Host

ELSEWHERE = "192.0.2.1"  # of a block that belongs to nobody (RFC 5737)
TRIES = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80), timeout=1)"
SWALLOWED = """
import socket

def test_that_tries():
    try:
        socket.getaddrinfo("example.org", 443)
    except OSError:
        pass

def test_that_does_not():
    pass
"""


@pytest.mark.parametrize("attempt", [
    lambda: socket.create_connection((ELSEWHERE, 80), timeout=1),
    lambda: socket.socket().connect_ex((ELSEWHERE, 80)),
    lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (ELSEWHERE, 53)),
    lambda: socket.getaddrinfo("example.org", 443),
    lambda: socket.gethostbyname("example.org"),
    lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
], ids=["connect", "connect_ex", "ipv6", "datagram", "name", "old name", "dead proxy"])  # fmt: skip
def test_an_attempt_is_refused_and_written_down(attempt, pytestconfig):
    with pytest.raises(PermissionError, match="tests don't use the network"):
        attempt()
    [line] = take_requests(pytestconfig)
    assert line.startswith(("connect", "sendto", "getaddrinfo", "gethostbyname")) and "pytest" in line


def test_this_machine_may_talk_to_itself():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(("localhost", server.getsockname()[1]), timeout=5):
        pass
    one, other = socket.socketpair()
    one.close(), other.close()


@pytest.mark.parametrize("environment", [
    None, command_environment, lambda: ComfyServer(Host(REPOSITORY, Path(sys.executable), ""), REPOSITORY)._environment(),
], ids=["inherited", "command", "server"])  # fmt: skip
def test_children_are_guarded(environment, pytestconfig):
    """Each with the environment in which tests start processes of this kind."""
    child = subprocess.run([sys.executable, "-c", TRIES], env=environment and environment(), capture_output=True, text=True)
    assert child.returncode == 1 and "tests don't use the network" in child.stderr
    [line] = take_requests(pytestconfig)
    assert ELSEWHERE in line


def test_a_test_that_swallows_the_refusal_fails_all_the_same(tmp_path, pytestconfig):
    (tmp_path / "test_it.py").write_text(SWALLOWED, "utf-8")
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", tmp_path],
                            cwd=REPOSITORY, capture_output=True, text=True)  # fmt: skip
    assert "1 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    assert "something reached for the network" in result.stdout and "getaddrinfo 'example.org'" in result.stdout
    assert take_requests(pytestconfig) == [], "the test that failed has reported it"


def test_no_test_starts_python_without_the_guard():
    """Whoever sets PYTHONPATH goes through `python_path`; the one exception downloads the hosts."""
    for file in (REPOSITORY / "tests").rglob("*.py"):
        for line in file.read_text("utf-8").splitlines():
            if re.search(r"""["']PYTHONPATH["']""", line) and file != Path(__file__):
                allowed = {"conftest.py": "python_path(", "comfy_server.py": '"offline"', "hosts.py": "if name !="}
                assert allowed.get(file.name, "python_path(") in line, f"{file}: {line.strip()}"


NETWORK = {"socket", "http", "requests", "httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "huggingface_hub"}


def test_only_the_download_can_reach_the_network():
    """What talks to other machines is imported in one place, which runs when somebody asks for a model by name."""
    for file in [*(REPOSITORY / "blip3o_core").rglob("*.py"), *(REPOSITORY / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            absolute = isinstance(node, ast.ImportFrom) and not node.level
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if absolute else []
            reaches = [name for name in names if name.split(".")[0] in NETWORK or name == "urllib.request"]
            assert not reaches or file.is_relative_to(REPOSITORY / "blip3o_core" / "hub"), f"{file} imports {reaches}"
