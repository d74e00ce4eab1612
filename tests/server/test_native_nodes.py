"""The diffusion model is a real MODEL: core's own nodes work on it, LoRA loading and training included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import graphs
from .comfy_server import ComfyServer
from .test_text_to_image import run_latent, saved_latents


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def with_model(graph: graphs.Graph, patch: dict) -> graphs.Graph:
    """Puts a model patch node between the loader and the sampler."""
    graph["patch"] = patch
    graph[graphs.EMBEDDING]["inputs"]["model"] = ["patch", 0]
    return graph


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> torch.Tensor:
    """The embedding of the plain graph, 10 steps of euler."""
    return run_latent(server, graphs.embedding_only(10))


def test_ksampler_on_the_simple_schedule_gives_the_reference_embedding(server, plain, relative_error):
    """With 10 steps core's `simple` spacing visits the sigmas of the reference, so the result must agree."""
    graph = graphs.embedding_only(10)
    graph[graphs.EMBEDDING] = node("KSampler", model=["1", 1], seed=7, steps=10, cfg=3.0, sampler_name="euler", scheduler="simple",
                                   positive=["2", 0], negative=["2", 1], latent_image=["3", 0], denoise=1.0)  # fmt: skip
    assert relative_error(run_latent(server, graph), plain) <= 1e-3  # measured 0


def test_custom_advanced_sampler_with_cfg_guider(server, plain, relative_error):
    graph = graphs.embedding_only(10)
    graph["noise"] = node("RandomNoise", noise_seed=7)
    graph["guider"] = node("CFGGuider", model=["1", 1], positive=["2", 0], negative=["2", 1], cfg=3.0)
    graph[graphs.EMBEDDING] = node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["5", 0],
                                   sigmas=["4", 0], latent_image=["3", 0])  # fmt: skip
    assert relative_error(run_latent(server, graph), plain) <= 1e-3  # measured 0


def test_zeroed_conditioning_of_core_is_the_null_condition(server, plain, relative_error):
    graph = graphs.embedding_only(10)
    graph["zero"] = node("ConditioningZeroOut", conditioning=["2", 0])
    graph[graphs.EMBEDDING]["inputs"]["negative"] = ["zero", 0]
    assert relative_error(run_latent(server, graph), plain) <= 1e-3  # measured 0


def test_higher_order_samplers_of_core(server):
    graph = graphs.embedding_only(8)
    graph["5"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    assert run_latent(server, graph).isfinite().all()


def test_model_sampling_shift_changes_the_schedule(server, plain):
    graph = with_model(graphs.embedding_only(10), node("ModelSamplingSD3", model=["1", 1], shift=3.0))
    graph["4"] = node("BasicScheduler", model=["patch", 0], scheduler="simple", steps=10, denoise=1.0)
    z = run_latent(server, graph)
    assert z.isfinite().all()
    assert (z - plain).abs().max() > 1e-2


def test_partial_denoising_starts_from_the_embedding(server, plain):
    """What is kept of a given embedding grows as denoise falls."""
    graph = graphs.embedding_only(10)
    graph["again"] = node("KSampler", model=["1", 1], seed=8, steps=10, cfg=1.0, sampler_name="euler", scheduler="simple",
                          positive=["2", 0], negative=["2", 1], latent_image=[graphs.EMBEDDING, 0], denoise=0.2)  # fmt: skip
    graph["save"]["inputs"]["samples"] = ["again", 0]
    near = run_latent(server, graph)
    graph["again"]["inputs"]["denoise"] = 0.9
    far = run_latent(server, graph)
    assert 0 < (near - plain).norm() < (far - plain).norm()


def write_lora(server: ComfyServer, name: str, scale: float) -> list[str]:
    """A rank-2 LoRA on two layers of the tiny DiT, as core reads it."""
    generator = torch.Generator().manual_seed(0)
    paths = ["layers.0.attn1.to_q", "layers.2.feed_forward.linear_1"]
    rows = {"layers.0.attn1.to_q": 48, "layers.2.feed_forward.linear_1": 256}
    tensors = {}
    for path in paths:
        tensors[f"diffusion_model.{path}.lora_A.weight"] = torch.randn(2, 48, generator=generator)
        tensors[f"diffusion_model.{path}.lora_B.weight"] = scale * torch.randn(rows[path], 2, generator=generator)
    folder = server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return paths


def test_a_lora_file_is_applied_by_core_without_unmatched_keys(server, plain, tiny_checkpoint, relative_error):
    from blip3o_core import Blip3oPipeline

    paths = write_lora(server, "test.safetensors", scale=0.3)
    loader = node("LoraLoaderModelOnly", model=["1", 1], lora_name="test.safetensors", strength_model=0.5)
    graph = with_model(graphs.embedding_only(10), loader)
    z = run_latent(server, graph)
    assert "lora key not loaded" not in server.log()
    assert (z - plain).abs().max() > 1e-2

    merged = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    lora = load_file(server.base_directory / "models" / "loras" / "test.safetensors")
    for path in paths:
        down, up = (lora[f"diffusion_model.{path}.lora_{part}.weight"] for part in "AB")
        merged.dit.get_submodule(path).weight += 0.5 * up @ down
    prompt = graphs.shipped()[graphs.PROMPT]["inputs"]["prompt"]
    headless = merged.sample_embeddings(merged.encode_prompt([prompt]), solver="euler", steps=10, seeds=[7])
    assert relative_error(z, headless) <= 1e-3  # measured 7.4e-7


def train_with_core(server: ComfyServer) -> Path:
    """Two steps of core's TrainLoraNode -> the file that SaveLoRA wrote."""
    graph = {key: value for key, value in graphs.embedding_only(3).items() if key != "save"}
    graph["train"] = node("TrainLoraNode", model=["1", 1], latents=[graphs.EMBEDDING, 0], positive=["2", 0], batch_size=1,
                          grad_accumulation_steps=1, steps=2, learning_rate=1e-3, rank=4, optimizer="AdamW", loss_function="MSE",
                          seed=0, training_dtype="fp32", lora_dtype="fp32", algorithm="LoRA", gradient_checkpointing=False,
                          existing_lora="[None]")  # fmt: skip
    # hosts differ in what else the node wants: take the defaults that its own description gives
    schema = server.object_info()["TrainLoraNode"]["input"]
    for name, (kind, *rest) in schema["required"].items():
        options = rest[0] if rest else {}
        graph["train"]["inputs"].setdefault(name, options.get("default", kind[0] if isinstance(kind, list) else None))
    graph["save"] = node("SaveLoRA", lora=["train", 0], prefix="loras/trained")
    result = server.run(graph)
    assert result.status == "success", result.error
    return max((server.base_directory / "output" / "loras").glob("trained*.safetensors"))


def test_core_trains_a_lora_on_it(server):
    """TrainLoraNode and SaveLoRA of core: the file has keys of every block under core's names."""
    keys = load_file(train_with_core(server)).keys()
    for index in range(3):
        assert any(f"diffusion_model.layers.{index}.attn2.to_k" in key for key in keys), sorted(keys)[:5]


def test_saved_latents_are_one_per_run(server, plain):
    """Guards the helper of these tests: the newest file is the one of the last run."""
    before = len(saved_latents(server))
    run_latent(server, graphs.embedding_only(2, noise_seed=12345))
    assert len(saved_latents(server)) == before + 1
