"""What people install: the archive that comfy-cli packs, put into a ComfyUI that has nothing but requirements.txt, and taken out again."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ..conftest import command_environment
from . import graphs
from .comfy_server import ComfyServer
from .hosts import DOWNLOAD_TIMEOUT_S, REPOSITORY, Host, HostSpec, prepare_comfy_cli, prepare_host, run_uv, selected_hosts

COMFY_CLI_TIMEOUT_S = 120
LARGEST_MIB = 32
CARRIED = (
    "__init__.py", "requirements.txt", "pyproject.toml", "LICENSE", "README.md", "nodes/", "web/docs/", "locales/zh/", "subgraphs/",
    "blip3o_core/nano/model/model.safetensors", "workflows/text_to_image.json", "workflows/text_to_image.jpg",
)  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node.zip, packed from a repository that holds what this one would commit."""
    copy = tmp_path_factory.mktemp("packing") / "pack"
    for name in own_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=copy, check=True)
    told = comfy_cli("validate", copy)
    assert "All validation checks passed" in told and not re.search(r"warning|error", told, re.IGNORECASE), told
    comfy_cli("pack", copy)
    return copy / "node.zip"


def own_files() -> list[str]:
    """What git knows or would add; of an export without its history, all but what building and testing leave behind."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if (REPOSITORY / name).is_file()]
    files = [str(file.relative_to(REPOSITORY)) for file in REPOSITORY.rglob("*") if file.is_file()]
    return [file for file in files if not re.search(r"(^|/)(\.git|__pycache__|build|\.venv.*|\.\w+_cache|[^/]+\.egg-info)/", file)]


def comfy_cli(action: str, folder: Path) -> str:
    """Runs `comfy node ACTION`, which has no need of the network. Returns what it printed."""
    command = [prepare_comfy_cli(), "--skip-prompt", "--no-enable-telemetry", "node", action]
    result = subprocess.run(command, cwd=folder, env=command_environment(), text=True, capture_output=True, timeout=COMFY_CLI_TIMEOUT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_archive_holds_what_runs_and_nothing_else(archive: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    assert [needed for needed in CARRIED if not any(name.startswith(needed) for name in names)] == []
    assert [name for name in names if name.startswith(("tests/", ".ci/")) or name.endswith((".pyc", ".py.orig"))] == []
    assert archive.stat().st_size <= LARGEST_MIB * 2**20


def test_it_installs_runs_and_leaves_nothing_behind(archive: Path, host: Host, tmp_path: Path) -> None:
    pack = tmp_path / "unpacked"
    shutil.unpack_archive(archive, pack)
    base = tmp_path / "comfyui"
    with ComfyServer(host, base, folder="comfyui-blip3o", pack=pack) as server:
        assert "IMPORT FAILED" not in server.log()
        assert {"Blip3oCheckpointLoader", "Blip3oAsk"} <= server.object_info().keys()
        assert server.run(graphs.shipped()).status == "success"
    assert list(base.glob("output/*.png"))
    (base / "custom_nodes" / "comfyui-blip3o").unlink()
    with ComfyServer(host, base, folder="another-pack", pack=empty_pack(tmp_path)) as server:
        assert not any(name.startswith("Blip3o") for name in server.object_info())
        assert "IMPORT FAILED" not in server.log()
    left = [file for folder in ("models", "custom_nodes", "user") for file in (base / folder).rglob("*") if "blip3o" in file.name.lower()]
    assert left == []


def empty_pack(folder: Path) -> Path:
    """The server puts a pack into custom_nodes; this one does nothing."""
    pack = folder / "empty"
    pack.mkdir()
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    return pack


@pytest.mark.parametrize("spec", selected_hosts(), ids=lambda spec: spec.name)
def test_no_package_of_the_host_is_downgraded(spec: HostSpec, tmp_path: Path) -> None:
    """Resolved by uv: the host's requirements alone, and with ours, which must ask for no older version of anything."""
    theirs = prepare_host(spec).tree / "requirements.txt"
    alone, together = (resolve(files, spec, tmp_path / name) for files, name in
                       (([theirs], "alone.txt"), ([theirs, REPOSITORY / "requirements.txt"], "together.txt")))  # fmt: skip
    assert {"torch", "transformers", "numpy"} <= alone.keys()
    assert {name: (version, together.get(name)) for name, version in alone.items() if version != together.get(name)} == {}
    ours = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in (REPOSITORY / "requirements.txt").read_text().split()}
    assert ours <= together.keys()


def resolve(requirements: list[Path], spec: HostSpec, output: Path) -> dict[str, str]:
    """Package -> version."""
    constraints = ["--constraints", str(spec.constraints)] if spec.constraints else []
    run_uv(["pip", "compile", "--quiet", "--no-header", "--no-annotate", *constraints, "--output-file", str(output),
            *map(str, requirements)], timeout_s=DOWNLOAD_TIMEOUT_S)  # fmt: skip
    return dict(line.split("==") for line in output.read_text().splitlines() if "==" in line)
