"""The shipped graph on a real server: the numbers of the headless pipeline, previews, batches, cancel."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from . import graphs
from .comfy_server import ComfyServer, Result

PROMPT, SEED = "A sea turtle swimming above a coral reef.", 7


@pytest.fixture(scope="module")
def shipped_run(server: ComfyServer) -> Result:
    result = server.run(graphs.text_to_image(PROMPT, SEED))
    assert result.status == "success", result.error
    return result


def as_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture -> (1, 3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


def saved_latents(server: ComfyServer) -> list[torch.Tensor]:
    """Every latent that SaveLatent has written, oldest first."""
    files = sorted((server.base_directory / "output").glob("*.latent"), key=lambda file: file.stat().st_mtime_ns)
    return [load_file(file)["latent_tensor"] for file in files]


def run_latent(server: ComfyServer, graph: graphs.Graph) -> torch.Tensor:
    result = server.run(graph)
    assert result.status == "success", result.error
    return saved_latents(server)[-1]


def test_the_graph_and_the_command_draw_the_same_picture(server, shipped_run, pipe, psnr):
    picture = as_tensor(server.images(shipped_run)[0])
    headless = pipe.generate([PROMPT], seeds=[SEED], solver="euler", width=graphs.SIDE, height=graphs.SIDE, output_type="pt")
    assert psnr(picture, headless) >= 45  # dB; measured 52.8 on both hosts: at most one grey level, from rounding to 8 bits
    other = pipe.generate([PROMPT], seeds=[SEED + 1], width=graphs.SIDE, height=graphs.SIDE, output_type="pt")
    assert psnr(picture, other) < 30, "other seeds must differ, or the test can't fail"


def test_core_dpm_solver_as_shipped_gives_the_headless_default(server, pipe, relative_error):
    z = run_latent(server, graphs.embedding_only(None, noise_seed=SEED))
    headless = pipe.sample_embeddings(pipe.encode_prompt([graphs.shipped()[graphs.PROMPT]["inputs"]["prompt"]]), seeds=[SEED])
    assert relative_error(z, headless) <= 1e-3  # measured 1.0e-6 and less, both hosts


@pytest.mark.parametrize("steps", [30, 10, 7])
def test_core_euler_on_our_sigmas_gives_the_headless_embedding(server, pipe, relative_error, steps):
    z = run_latent(server, graphs.embedding_only(steps, noise_seed=SEED))
    prompt = graphs.shipped()[graphs.PROMPT]["inputs"]["prompt"]
    headless = pipe.sample_embeddings(pipe.encode_prompt([prompt]), solver="euler", steps=steps, guidance_scale=3.0, seeds=[SEED])
    assert relative_error(z, headless) <= 1e-3  # measured 6.2e-7 and less, both hosts


def test_previews_of_the_embedding_are_colour_maps(server):
    result = server.run(graphs.embedding_only(steps=6, noise_seed=100))
    assert result.status == "success", result.error
    assert len(result.previews) >= 3, "the host thins previews out when steps are fast"
    picture = Image.open(io.BytesIO(result.previews[-1]))
    assert picture.width == picture.height >= 256
    assert len(set(picture.convert("RGB").resize((8, 8)).getdata())) > 16, "a map of 64 tokens, not one colour"


def test_a_batch_of_embeddings_becomes_a_batch_of_pictures(server):
    graph = graphs.text_to_image(PROMPT, SEED)
    graph["3"]["inputs"]["batch_size"] = graph[graphs.SIZE]["inputs"]["batch_size"] = 2
    for schedule in (graphs.SCHEDULE, graphs.PICTURE_SCHEDULE):
        graph[schedule]["inputs"]["steps"] = 3
    result = server.run(graph)
    assert result.status == "success", result.error
    first, second = (as_tensor(image) for image in server.images(result))
    assert (first - second).abs().max() > 0.1


def test_models_freed_by_the_host_are_loaded_again(server, shipped_run):
    server.post("/free", {"unload_models": True, "free_memory": True})
    again = server.run(graphs.text_to_image(PROMPT, SEED))
    assert again.status == "success", again.error
    before, after = (server.images(result)[0].tobytes() for result in (shipped_run, again))
    assert before == after


def interrupted_run(server: ComfyServer, graph: graphs.Graph, node: str, at_step: int) -> tuple[Result, list[int], float]:
    """Interrupts when `node` reports `at_step`; also returns the steps it reported and the seconds until it stopped."""
    steps, asked = [], []

    def watch(event: dict) -> None:
        data = event["data"]
        if event["type"] == "progress" and str(data.get("node")) == node:
            steps.append(data["value"])
            if data["value"] >= at_step and not asked:
                asked.append(time.monotonic())
                server.interrupt()

    result = server.run(graph, on_event=watch)
    assert asked, f"node {node} never reached step {at_step}"
    return result, steps, time.monotonic() - asked[0]


@pytest.mark.parametrize(("node", "schedule"), [(graphs.EMBEDDING, graphs.SCHEDULE), (graphs.PICTURE, graphs.PICTURE_SCHEDULE)])
def test_interrupt_stops_within_one_step_and_the_next_prompt_runs(server, node, schedule):
    """Steps are made slow (a batch of 256, pictures of 256 pixels), so that a step more would be seen."""
    graph = graphs.text_to_image(f"interrupted in {node}", SEED)
    graph[schedule]["inputs"]["steps"] = 900
    if node == graphs.EMBEDDING:
        graph["3"]["inputs"]["batch_size"] = 256
    else:
        graph[graphs.SCHEDULE]["inputs"]["steps"] = 3
        for size in (graphs.SIZE, graphs.CONDITIONING):
            graph[size]["inputs"].update(width=256, height=256)
    result, steps, seconds = interrupted_run(server, graph, node, at_step=3)
    assert result.status == "interrupted"
    assert max(steps) <= 4, "the message may arrive while step 4 ends; a fifth step must not"
    assert seconds < 5  # measured 0.01 to 0.33: networks of comfy ops stop in the middle of a forward pass

    after = server.run(graphs.text_to_image("the next prompt", SEED))
    assert after.status == "success", after.error
