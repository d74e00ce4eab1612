"""Offloading: the same pictures and answers, with less in memory."""

import pytest
import torch
from PIL import Image

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint import streaming
from blip3o_core.errors import InputError
from blip3o_core.lora.files import write_lora
from blip3o_core.pipelines import residency
from blip3o_core.pipelines.residency import STAGES, choose
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..conftest import DATA
from .lora_samples import random_lora

SMALL = {"width": 64, "height": 64, "decoder_steps": 2, "steps": 2}
SANA = DATA / "sana" / "checkpoint"


def opened(checkpoint, offload, **more) -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32, offload=offload,
                                          vision_encoder=DATA / "sdxl" / "eva_clip_vision_tower", **more)  # fmt: skip


def loaded(pipe: Blip3oPipeline) -> set[str]:
    """Names of the networks that are in memory."""
    return {name for names in STAGES.values() for name in names if getattr(pipe, f"_{name}") is not None}


@pytest.fixture
def tiny_layers(monkeypatch):
    """All but the very smallest tensors of the tiny checkpoint count as large."""
    monkeypatch.setattr(streaming, "KEPT_BYTES", 600)


@pytest.mark.parametrize("offload", ["stage", "layer"])
def test_pictures_and_answers_are_those_without_offloading(tiny_checkpoint, pipe, photograph, tiny_layers, offload):
    lean = opened(tiny_checkpoint, offload)
    plain = opened(tiny_checkpoint, "none")
    for work in (
        lambda p: p.generate(["a cat", "two dogs"], seeds=[1, 2], **SMALL)[1].tobytes(),
        lambda p: p.ask("What is this?", [photograph], max_new_tokens=5),
        lambda p: p.edit([photograph], ["Make it red"], strength=0.5, **SMALL)[0].tobytes(),
        lambda p: p.reconstruct(photograph, width=64, height=64, steps=2)[0].tobytes(),
    ):
        assert work(lean) == work(plain)
    assert len(loaded(plain)) == 6


@pytest.mark.parametrize("offload", ["stage", "layer"])
def test_a_sana_decoder_offloads_too(tiny_checkpoint, tiny_layers, offload):
    with Image.open(DATA / "sdxl" / "image.png") as picture:
        found, plain = (opened(tiny_checkpoint, mode, decoder=SANA).reconstruct(picture, steps=2)[0] for mode in (offload, "none"))
    assert found.tobytes() == plain.tobytes()


def test_networks_of_one_stage_at_a_time_and_none_twice_for_a_batch(tiny_checkpoint):
    loads = []
    pipe = opened(tiny_checkpoint, "stage", on_load=lambda component, done, total: done == total and loads.append(component))
    most = 0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal most
        groups = {group for group, names in STAGES.items() if loaded(pipe) & set(names)}
        most = max(most, len(groups))

    pipe.generate(["a cat"], seeds=[1], on_step=watch, **SMALL)  # with a null prompt of its own, which needs backbone and DiT
    assert most == 1 and loaded(pipe) == {"decoder"}
    assert loads == ["language backbone", "diffusion transformer", "decoder's UNet", "decoder's VAE"]


def test_layers_let_go_of_their_weights(tiny_checkpoint, tiny_layers):
    pipe = opened(tiny_checkpoint, "layer")
    pipe.generate(["a cat"], seeds=[1], **SMALL)
    for network in (pipe.backbone, pipe.dit, pipe.decoder.unet):
        held = [(name, parameter) for name, parameter in network.named_parameters() if parameter.device.type != "meta"]
        assert all(parameter.nbytes < 600 or "embed_tokens" in name or "latent_queries" in name for name, parameter in held), held
    assert pipe.backbone.language_model.embed_tokens.weight.device.type == "cpu"  # a mapping of the file


def test_a_layer_that_fails_lets_go_too(tiny_checkpoint, tiny_layers):
    dit = opened(tiny_checkpoint, "layer").dit
    layer = dit.layers[0].feed_forward.linear_1
    with pytest.raises(RuntimeError), torch.inference_mode():
        layer(torch.zeros(1, 3))
    assert layer.weight.is_meta


@pytest.mark.parametrize(("free", "chosen"), [(None, "none"), (100, "none"), (60, "stage"), (20, "layer")])
def test_the_mode_follows_from_free_memory(free, chosen):
    assert choose({"language": 30, "embedding": 20, "picture": 25}, free) == chosen


def test_auto_measures_and_loras_are_never_streamed(tiny_checkpoint, tmp_path, monkeypatch):
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, random_lora(Blip3oCheckpoint.open(tiny_checkpoint)))
    monkeypatch.setattr("blip3o_core.pipelines.blip3o.free_memory", lambda device: 1000)
    assert opened(tiny_checkpoint, "auto").offload == "layer"
    assert opened(tiny_checkpoint, "auto", loras=[(lora, 1.0)]).offload == "stage"
    with pytest.raises(InputError, match="can't add a LoRA"):
        opened(tiny_checkpoint, "layer", loras=[(lora, 1.0)])
    with pytest.raises(InputError, match="offload 'disk' is unknown"):
        opened(tiny_checkpoint, "disk")
    assert residency.free_memory(torch.device("cpu")) is None or residency.free_memory(torch.device("cpu")) > 2**20
