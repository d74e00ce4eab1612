"""Fixtures of the server tests: each test runs on every host of hosts.py, against a real ComfyUI server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .comfy_server import ComfyServer
from .hosts import REPOSITORY, Host, HostSpec, prepare_host, selected_hosts

DATA = REPOSITORY / "tests" / "data" / "sdxl"
MODELS = {"blip3o/tiny": DATA / "checkpoint", "blip3o/eva": DATA / "eva_clip_vision_tower"}
TEST_TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder. Their timeout leaves out fixtures: the first run downloads about 5 GB."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("server")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, func_only=True))


@pytest.fixture(scope="session", params=selected_hosts(), ids=lambda spec: spec.name)
def host(request: pytest.FixtureRequest) -> Host:
    spec: HostSpec = request.param
    return prepare_host(spec)


@pytest.fixture(scope="module")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the tiny checkpoint and EVA-CLIP tower. One for each test file: no cached outputs of other files."""
    with ComfyServer(host, tmp_path_factory.mktemp("comfyui"), models=MODELS) as running:
        yield running
