"""Fixtures of the browser tests: a real server, a Chromium without a window, and a tab of its own for each test.

Environment variables (those of chromium.py as well):
    BLIP3O_SCREENSHOTS  the folder for pictures of what was on the screen (default: a temporary one; the end of the output names it)
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from blip3o_core.lora.files import write_lora
from blip3o_core.variants.blip3o import NANO_FOLDER, Blip3oCheckpoint

from ..server.comfy_server import ADDRESS, ComfyServer
from ..server.hosts import Host, prepare_host, selected_hosts
from ..unit.lora_samples import random_lora
from . import chromium
from .front_end import SIZE, FrontEnd

TEST_TIMEOUT_S = 300
FRONT_ENDS_OWN = "https://api.comfy.org/"  # it looks nodes up there when it shows errors, whatever packs are installed
SCREENSHOTS = pytest.StashKey[Path]()
REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder. Their timeout leaves out fixtures, which may download a host."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("server")
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    item.stash.setdefault(REPORTS, {})[report.when] = report
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if folder := config.stash.get(SCREENSHOTS, None):
        terminalreporter.write_line(f"screenshots of the browser tests: {folder}")


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    named = os.environ.get("BLIP3O_SCREENSHOTS")
    folder = Path(named).expanduser().absolute() if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    pytestconfig.stash[SCREENSHOTS] = folder
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium.find()
    if program is None:
        (pytest.fail if chromium.is_required() else pytest.skip)(chromium.ADVICE)
    with chromium.launch(program) as running:
        yield running


@pytest.fixture(scope="session", params=selected_hosts(), ids=lambda spec: spec.name)
def host(request: pytest.FixtureRequest) -> Host:
    return prepare_host(request.param)


@pytest.fixture(scope="module")
def server(browser: Browser, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    furnish(base, host)
    with ComfyServer(host, base) as running:
        yield running


def furnish(base: Path, host: Host) -> None:
    """As after an installation: with the picture that ComfyUI brings along, and a LoRA of the name in the workflow."""
    (base / "input").mkdir()
    shutil.copy(host.tree / "input" / "example.png", base / "input")
    (base / "models" / "loras").mkdir(parents=True)
    write_lora(base / "models" / "loras" / "blip3o_lora.safetensors", random_lora(Blip3oCheckpoint.open(NANO_FOLDER)))


@pytest.fixture
def front_end(browser: Browser, server: ComfyServer, screenshots: Path, request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    """A fresh tab. At the end nothing may have asked for another machine; what a test that fails has seen last is kept as a picture."""
    context = browser.new_context(viewport=SIZE)
    elsewhere: list[str] = []
    own = (f"http://{ADDRESS}:{server.port}/", f"ws://{ADDRESS}:{server.port}/", "data:", "blob:", FRONT_ENDS_OWN)
    context.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
    page = context.new_page()
    page.on("websocket", lambda socket: None if socket.url.startswith(own) else elsewhere.append(socket.url))
    tab = FrontEnd(page, server, screenshots)
    tab.open()
    yield tab
    if request.node.stash[REPORTS]["call"].failed:
        tab.screenshot(re.sub(r"[^\w.-]+", "-", f"failed-{request.node.name}"))
    context.close()
    assert not elsewhere, "the browser was asked to leave this machine"
