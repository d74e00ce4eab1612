"""What goes wrong around a server: it is killed, its disk is full, its models vanish, another server reads the same files."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ..disks import small_disk
from . import graphs
from .comfy_server import ComfyServer, NoAnswer, PromptRejected
from .conftest import MODELS
from .hosts import Host

STEPS = 4
QUEUED = 3


def short(seed: int, checkpoint: str = graphs.TINY) -> graphs.Graph:
    return graphs.replace_inputs(graphs.text_to_image(seed=seed, checkpoint=checkpoint), steps=STEPS)


def pixels(server: ComfyServer, graph: graphs.Graph) -> bytes:
    result = server.run(graph)
    assert result.status == "success", (result.error, server.log()[-2000:])
    [image] = server.images(result)
    return image.tobytes()


def test_a_server_that_is_killed_goes_on_with_the_same_queue(server: ComfyServer, host: Host, tmp_path: Path) -> None:
    expected = [pixels(server, short(seed)) for seed in range(QUEUED)]
    victim = ComfyServer(host, tmp_path, models=MODELS)
    with victim:
        half_way = threading.Event()
        with ThreadPoolExecutor() as pool:
            running = pool.submit(victim.run, short(1000), on_event=lambda event: event["type"] == "progress" and half_way.set())
            assert half_way.wait(120)
            for seed in range(QUEUED):
                victim.queue(short(seed))
            victim.kill()
            with pytest.raises(NoAnswer):
                running.result()
        for file in (tmp_path / "output").rglob("*.png"):
            Image.open(file).load()  # whole
        victim.start()
        assert [pixels(victim, short(seed)) for seed in range(QUEUED)] == expected


def test_a_full_disk_fails_the_picture_and_not_the_server(host: Host, tmp_path: Path) -> None:
    with small_disk(tmp_path / "output", "64k"), ComfyServer(host, tmp_path, models=MODELS) as server:
        filler = tmp_path / "output" / "filler"
        filler.write_bytes(bytes(os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize))
        result = server.run(short(1))
        assert result.status == "error" and result.error["node_type"] == "SaveImage"
        assert "No space left on device" in result.error["exception_message"]
        filler.unlink()
        again = server.run(short(1))
        assert again.status == "success"
        ran = {event["data"]["node"] for event in again.events if event["type"] == "executing"}
        assert ran.isdisjoint({graphs.PROMPT, graphs.EMBEDDING, graphs.PICTURE}), "what was computed is not computed again"
        server.images(again)[0].load()


def test_a_checkpoint_that_vanishes_while_it_is_loaded(server: ComfyServer, tiny_checkpoint: Path) -> None:
    folder = server.base_directory / "models" / "blip3o" / "fleeting"
    shutil.copytree(tiny_checkpoint, folder)
    expected = pixels(server, short(7, "fleeting"))
    shutil.rmtree(folder)
    with pytest.raises(PromptRejected, match="'fleeting' is not in models/blip3o. Put it there and press R"):
        server.run(short(8, "fleeting"))
    assert pixels(server, short(7)) == expected, "another copy of it works"
    shutil.copytree(tiny_checkpoint, folder)
    assert pixels(server, short(7, "fleeting")) == expected, "and it works when it is back"


def test_weights_that_vanish_between_two_stages(server: ComfyServer, tiny_checkpoint: Path) -> None:
    """The vision tower is read when a picture is first shown, which may be long after the model was opened."""
    folder = server.base_directory / "models" / "blip3o" / "partial"
    shutil.copytree(tiny_checkpoint, folder)
    text_only = graphs.ask("What is this?", checkpoint="partial")
    assert server.run(text_only).status == "success"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    seen = graphs.ask("What is this?", checkpoint="partial", images=["image", 0])
    seen["image"] = graphs.empty_image(56, 56)
    result = server.run(seen)
    assert result.status == "error" and str(folder / "model.safetensors") in result.error["exception_message"]
    assert pixels(server, short(9))


def test_two_servers_share_one_folder_of_models(server: ComfyServer, host: Host, tmp_path: Path) -> None:
    shared = tmp_path / "paths.yaml"
    shared.write_text(f"shared:\n  base_path: {server.base_directory / 'models'}\n  blip3o: blip3o\n")
    with ComfyServer(host, tmp_path / "second", extra_args=["--extra-model-paths-config", str(shared)]) as second:
        with ThreadPoolExecutor() as pool:
            drawn = list(pool.map(lambda one: pixels(one, short(11)), [server, second]))
        assert drawn[0] == drawn[1]
