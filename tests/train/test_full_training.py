"""train.method = "full": what trains changes, everything else stays, and the result is a checkpoint like any other.

One short run per part, in the order in which a small model is made: language, eyes, pictures behind them; decoder and towers apart.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint.shards import read_tensor
from blip3o_core.errors import ConfigError
from blip3o_core.models.qwen2_5_vl import TiedHead
from blip3o_core.train.run import run_training
from blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint

from .training_samples import DATA, prepare, training_config, write_data

DIT = "model.dit.model."
LANGUAGE = ("model.embed_tokens.", "model.layers.", "model.norm.")
EVA = "model.gen_vision_tower.vision_tower.model."
# name -> trained parts, tasks, learning rate, beginnings of the names of the tensors that change, further overrides
RUNS = {
    "backbone": (["backbone"], ["understand", "text"], 3e-3, (*LANGUAGE, "lm_head."), ()),
    "vision": (["vision"], ["understand"], 3e-3, ("visual.",), ()),
    "vision, by labels": (["vision"], ["segment"], 3e-3, ("visual.",), ()),
    "language model, by labels": (["backbone"], ["segment"], 3e-3, LANGUAGE, ()),
    "drawing": (["dit", "latent_queries"], ["text_to_image", "edit", "reconstruct"], 3e-3, (DIT, "model.latent_queries"), ()),
    "all that draws, with regression": (["dit", "latent_queries", "backbone"], ["text_to_image", "edit"], 3e-3,
                                        (DIT, "model.latent_queries", *LANGUAGE), ("objective.regression_weight=1",)),
    "queries and language model, without the DiT": (
        ["latent_queries", "backbone"], ["text_to_image", "edit", "understand"], 3e-3, ("model.latent_queries", *LANGUAGE, "lm_head."),
        ("objective.regression_weight=1", "objective.draws_per_sample=0"),
    ),
    "decoder": (["decoder"], ["decode"], 3e-3, ("unet.",), ()),
    "decoder, cached": (["decoder"], ["decode"], 3e-3, ("unet.",), ("cache.enabled=true",)),
    "clip": (["clip"], ["contrast"], 1e-3, (EVA,), ()),
    "clip, with labels": (["clip"], ["contrast", "segment"], 1e-3, (EVA,), ("train.batch_size=8",)),
    "vae": (["vae"], ["autoencode"], 3e-3, ("vae.",), ()),
    "vae, pixels only": (["vae_decoder"], ["autoencode"], 3e-3, ("vae.decoder.", "vae.post_quant_conv."), ("objective.latent_noise=0.2",)),
    "vae, with thumbnails": (["vae"], ["autoencode"], 3e-3, ("vae.",), ("objective.thumbnail_weight=1",)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module", params=RUNS)
def finished(request, data, tmp_path_factory):
    """(name, output folder) of a run of a few updates."""
    parts, tasks, rate, _, overrides = RUNS[request.param]
    output = tmp_path_factory.mktemp("run") / "out"
    config = training_config(data, output, tasks, "train.method=full", f"train.parts={json.dumps(parts)}", "train.steps=3",
                             f"optimizer.learning_rate={rate}", "optimizer.schedule=constant", "validation.every=3",
                             "validation.samples=2", "validation.timesteps=2", "train.batch_size=2", *overrides)  # fmt: skip
    before = content(DATA)
    assert run_training(config) == 0
    assert content(DATA) == before  # the files that were trained from
    return request.param, output


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their names in the files; those of the decoder behind unet. and vae."""
    root = {entry.name: entry for part in Blip3oCheckpoint.open(folder).components.values() for entry in part.values()}
    decoder = SdxlDecoderCheckpoint.open(folder)
    entries = {**root, **{f"{part}.{name}": entry for part in ("unet", "vae") for name, entry in getattr(decoder, part).items()}}
    return {name: read_tensor(entry) for name, entry in entries.items()}


def test_only_what_trains_changes(finished):
    name, output = finished
    changing = RUNS[name][3]
    old, new = stored(DATA / "checkpoint"), stored(output / "model")
    if name.startswith("clip"):
        old |= {EVA + key: value for key, value in torch.load(DATA / "eva_clip_vision_tower/pytorch_model.bin").items()}
    assert new.keys() == old.keys()
    same = {key for key, value in new.items() if torch.equal(value, old[key])}
    assert not {key for key in new.keys() - same if not key.startswith(changing)}
    assert not {key for key in same if key.startswith(changing) and not key.endswith((".k_proj.bias", ".attn.qkv.bias"))
                and not re.search(r"(to_k\.bias|visual.*qkv\.bias)$", key)}  # fmt: skip
    assert {key: value.dtype for key, value in new.items()} == {key: old[key].dtype for key in new}


def test_the_exported_tensors_are_the_trained_ones(finished):
    name, output = finished
    trained = load_file(output / "checkpoints" / "step_00000003" / "trained.safetensors")
    names = {"backbone.latent_queries": "model.latent_queries", "backbone.language_model.": "model.", "output_head.": "lm_head.",
             "vision_tower.network.": "visual.", "dit.": DIT, "vision_encoder.": EVA, "unet.": "unet.", "vae.": "vae."}  # fmt: skip
    new = stored(output / "model")
    found = 0
    for key, value in trained.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
        if prefix is None:
            assert key.startswith(("text_tower.", "segmentation_head.", "embedding_head.", "thumbnail_head."))
            continue
        assert torch.equal(new[names[prefix] + key.removeprefix(prefix)], value), key
        found += 1
    assert found == sum(key.startswith(RUNS[name][3]) for key in new)


def test_what_stays_is_linked(finished):
    name, output = finished
    base, result = DATA / "checkpoint", output / "model"
    assert os.path.samefile(base / "model.safetensors", result / "model-base.safetensors")
    for part in ("unet", "vae"):
        old, new = (next((folder / "diffusion-decoder" / part).glob("*.safetensors")) for folder in (base, result))
        assert os.path.samefile(old, new) == (not any(own.startswith(f"{part}.") for own in RUNS[name][3]))


def test_validation_falls(finished, logged):
    name, output = finished
    first, last = (line["losses"] for line in logged(output, "validation"))
    assert first.keys() == set(RUNS[name][1])
    assert all(last[task] < first[task] for task in first), (first, last)


def test_the_result_draws_and_answers(finished):
    name, output = finished
    pipe = Blip3oPipeline.from_pretrained(output / "model", device="cpu", dtype=torch.float32)
    [image] = pipe.generate("a red square", steps=2, decoder_steps=2, width=64, height=64)
    assert image.size == (64, 64)
    if name in ("backbone", "vision"):
        assert isinstance(pipe.ask("say red", max_new_tokens=2), str)


@pytest.mark.parametrize("finished", ["clip"], indirect=True)
def test_the_exported_tower_keeps_its_heads(finished):
    _, output = finished
    assert json.loads((output / "model" / "config.json").read_text())["gen_vision_config"]["head_width"] == 12
    source = Blip3oCheckpoint.open(output / "model").vision_encoder_source()
    assert (source.config.head_width, source.config.heads) == (12, 4)
    assert source.load(dtype=torch.float32)(torch.zeros(1, 3, 448, 448)).shape == (1, 48, 8, 8)


@pytest.mark.parametrize("finished", ["vae"], indirect=True)
def test_the_scaling_factor_of_a_trained_vae(finished, data):
    _, output = finished
    factor = json.loads((output / "model/diffusion-decoder/vae/config.json").read_text())["scaling_factor"]
    prepared = prepare(training_config(data, output / "again", ["decode"], "train.method=full", 'train.parts=["decoder"]',
                                       checkpoint=output / "model"), per_task=4)  # fmt: skip
    latents = prepared.frozen.latents(torch.stack([example.picture for example in prepared.examples]))
    assert latents.std().item() == pytest.approx(1, rel=1e-5)
    assert factor != 0.13025


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_gradients_reach_all_that_trains_and_nothing_else(name, checkpointing, data, tmp_path):
    parts, tasks, *_ = RUNS[name]
    prepared = prepare(training_config(data, tmp_path / "out", tasks, "train.method=full", f"train.parts={json.dumps(parts)}",
                                       f"train.gradient_checkpointing={str(checkpointing).lower()}"))  # fmt: skip
    model = prepared.model
    gradients = prepared.gradients()
    assert gradients.keys() == model.trained().keys()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    networks = [getattr(prepared.frozen, loaded) for loaded in prepared.frozen.loaded]
    assert all(parameter.grad is None and not parameter.requires_grad for network in networks for parameter in network.parameters())
    modules = [module for network in (model, *networks) for module in network.modules() if list(module.parameters())]
    in_training = {module for module in modules if module.training}
    assert in_training <= {inner for module in model.active for inner in module.modules()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_a_compiled_dit_learns_the_same(data, tmp_path):
    """The language model was seen to pass as well; it takes minutes to compile."""
    gradients = {}
    for compiled in (False, True):
        prepared = prepare(training_config(data, tmp_path / "out", ["text_to_image"], "train.method=full", 'train.parts=["dit"]',
                                           f"train.compile={str(compiled).lower()}"))  # fmt: skip
        assert (prepared.model.dit._compiled_call_impl is not None) == compiled
        gradients[compiled] = prepared.gradients()
    assert gradients[True].keys() == gradients[False].keys()
    for parameter, gradient in gradients[False].items():
        assert (gradients[True][parameter] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), parameter


def test_compiling_without_a_compiler_is_refused_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.compile needs a C\+\+ compiler"):
        prepare(training_config(data, tmp_path / "out", ["text_to_image"], "train.compile=true"))


def test_tied_embeddings_in_bfloat16(data, checkpoint_copy, tmp_path):
    """The output head of such a checkpoint is its embedding matrix: one tensor, trained through both uses, stored as it was."""
    tensors = load_file(checkpoint_copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name: value.bfloat16() for name, value in tensors.items()}, checkpoint_copy / "model.safetensors")
    config = json.loads((checkpoint_copy / "config.json").read_text())
    (checkpoint_copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    arguments = ("train.method=full", 'train.parts=["backbone"]', "train.steps=2", "validation.every=0", "optimizer.learning_rate=1e-2")
    run_config = training_config(data, tmp_path / "out", ["text"], *arguments, checkpoint=checkpoint_copy)
    head = prepare(run_config).model.output_head
    assert isinstance(head, TiedHead) and not list(head.parameters())
    assert run_training(run_config) == 0
    old, new = stored(checkpoint_copy), stored(tmp_path / "out" / "model")
    trained = load_file(tmp_path / "out/checkpoints/step_00000002/trained.safetensors")
    assert new.keys() == old.keys() and "lm_head.weight" not in new
    wanted = trained["backbone.language_model.embed_tokens.weight"]
    assert wanted.dtype == torch.float32 and not torch.equal(wanted.bfloat16(), old["model.embed_tokens.weight"])
    assert torch.equal(new["model.embed_tokens.weight"], wanted.bfloat16())
    assert isinstance(Blip3oPipeline.from_pretrained(tmp_path / "out/model", device="cpu").ask("say red", max_new_tokens=2), str)


@pytest.mark.parametrize(("parts", "tasks", "overrides", "message"), [
    (["dit"], ["text_to_image", "text"], (), "task = 'text' trains only backbone, but this run trains dit"),
    (["dit", "vision"], ["text_to_image"], (), "vision is to be trained, but no dataset has a task that reaches it: edit, reconstruct"),
    (["decoder"], ["text_to_image"], (), "task = 'text_to_image' trains only"),
    (["clip", "dit"], ["contrast", "text_to_image"], (), "clip can't train in one run with text_to_image"),
    (["clip", "decoder"], ["contrast", "decode"], (), "clip can't train in one run with decode"),
    (["vae", "decoder"], ["autoencode", "decode"], (), "vae can't train in one run with decode"),
    (["clip"], ["contrast"], ("train.batch_size=1",), "tells the pictures of one batch apart"),
    (["vae"], ["autoencode"], ("train.precision=fp16",), "the VAE overflow"),
    (["backbone"], ["text"], ("train.precision=fp16",), "Qwen2.5-VL and the VAE overflow"),
])  # fmt: skip
def test_contradictions_are_found_before_weights_are_read(parts, tasks, overrides, message, data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("blip3o_core.train.run.build_model", refuse)
    from blip3o_core.train.run import open_run

    config = training_config(data, tmp_path / "out", tasks, "train.method=full", f"train.parts={json.dumps(parts)}", *overrides)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_run(config, "fp32")


def test_a_vae_is_trained_whole_or_by_half(data, tmp_path):
    with pytest.raises(ConfigError, match="vae and vae_decoder, which is one half of it"):
        training_config(data, tmp_path / "out", ["autoencode"], "train.method=full", 'train.parts=["vae","vae_decoder"]')
