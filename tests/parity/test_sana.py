"""SigLIP2 + SANA against numbers of the original implementation, float32 on CPU, in both published layouts.

Beside each tolerance: what was measured with torch 2.13 / diffusers 0.42.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_core.errors import CheckpointError, InputError
from blip3o_core.images import siglip_pixel_values
from blip3o_core.sampling.dpm_solver import dpm_sigmas, dpm_timestep
from blip3o_core.variants.sana_decoder import LAYOUTS, PUBLISHED, SanaDecoderCheckpoint

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "sana" / "checkpoint"
MANIFEST = DATA / "manifests" / "siglip2-sana.json"


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(DATA / "sana" / "expected.safetensors")


def renamed(layout: str, name: str) -> str:
    """A name of the first layout in another one."""
    for part, prefix in LAYOUTS["siglip2_sana"].items():
        if name.startswith(prefix):
            return LAYOUTS[layout][part] + name.removeprefix(prefix)
    raise AssertionError(name)


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory) -> Path:
    copy = Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("sana") / request.param))
    if request.param != "siglip2_sana":
        tensors = load_file(copy / "model.safetensors")
        save_file({renamed(request.param, name): tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
        (copy / "config.json").write_text(json.dumps({"model_type": "diffusion_decoder"}), "utf-8")
    return copy


@pytest.fixture(scope="module")
def checkpoint(folder) -> SanaDecoderCheckpoint:
    return SanaDecoderCheckpoint.open(folder, scheduler="dpmsolver++")


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return checkpoint.load(dtype=torch.float32)


def test_pixels_of_a_picture(numbers):
    with Image.open(DATA / "sdxl" / "image.png") as picture:
        found = siglip_pixel_values([picture], size=128)
    assert (found - numbers["source.pixel_values"]).abs().max() <= 1e-6  # measured 0


@torch.inference_mode()
def test_features_of_a_picture_and_of_a_black_one(checkpoint, numbers, relative_error):
    encoder = checkpoint.load_encoder(dtype=torch.float32)
    pixels = torch.cat((torch.full_like(numbers["source.pixel_values"], -1), numbers["source.pixel_values"]))
    found = encoder(pixels).flatten(2).transpose(1, 2)
    assert relative_error(found, numbers["encoder.pooled"]) <= 1e-5
    assert relative_error(encoder(pixels[1:]), encoder(pixels)[1:]) <= 1e-5


@torch.inference_mode()
def test_connector_and_velocity(decoder, numbers, relative_error):
    context = decoder.connector(numbers["encoder.pooled"])
    assert relative_error(context, numbers["connector"]) <= 1e-5
    v = decoder.transformer(numbers["dit.x"], encoder_hidden_states=context, timestep=numbers["dit.t"]).sample
    assert relative_error(v, numbers["dit.v"]) <= 1e-5


@torch.inference_mode()
def test_the_position_table_is_a_switch(folder, numbers, relative_error):
    plain = SanaDecoderCheckpoint.open(folder, positions="none").load(dtype=torch.float32)
    v = plain.transformer(numbers["dit.x"], encoder_hidden_states=numbers["connector"], timestep=numbers["dit.t"]).sample
    assert relative_error(v, numbers["dit.v"]) > 0.1
    with pytest.raises(InputError, match="positions 'rope' of a SANA decoder is unknown. Use one of sincos, none."):
        SanaDecoderCheckpoint.open(folder, positions="rope")


@torch.inference_mode()
def test_pixels_of_latents(decoder, numbers, relative_error):
    found = decoder.vae.decode(numbers["vae.z"] / 0.41407).sample
    assert relative_error(found, numbers["vae.decoded"]) <= 1e-5


@pytest.mark.parametrize(("steps", "guidance_scale"), [(30, 3.0), (10, 1.5)])
@torch.inference_mode()
def test_sampled_latents_and_their_picture(decoder, numbers, relative_error, steps, guidance_scale):
    null, source = numbers["encoder.pooled"].split(1)
    latents = decoder.sample_latents(source, null, numbers["noise"], steps=steps, guidance_scale=guidance_scale)
    name = f"sample.steps{steps}.cfg{guidance_scale}"
    assert relative_error(latents, numbers[f"{name}.latents"]) <= 1e-5
    assert (decoder.decode_latents(latents) - numbers[f"{name}.image"]).abs().max() <= 1e-5


@torch.inference_mode()
def test_features_of_another_stage(decoder, numbers):
    """`pred_latent` of the reference: the tokens of a first stage in place of the encoder's."""
    latents = decoder.sample_latents(numbers["pred_latent"][None], numbers["encoder.pooled"][:1], numbers["noise"], steps=10,
                                     guidance_scale=3.0)  # fmt: skip
    assert (decoder.decode_latents(latents) - numbers["sample.pred_latent.steps10.cfg3.0.image"]).abs().max() <= 1e-5


@torch.inference_mode()
def test_euler_is_flow_matching_without_a_shift(folder, numbers, relative_error):
    """Layout 2 samples so. The reference data don't cover it; against the formula written out."""
    decoder = SanaDecoderCheckpoint.open(folder, scheduler="euler").load(dtype=torch.float32)
    null, source = numbers["encoder.pooled"].split(1)
    found = decoder.sample_latents(source, null, numbers["noise"], steps=5, guidance_scale=2.0)
    x, context = numbers["noise"], decoder.connector(torch.cat((null, source)))
    for sigma in (1.0, 0.8, 0.6, 0.4, 0.2):
        v = decoder.transformer(x.expand(2, -1, -1, -1), encoder_hidden_states=context, timestep=torch.tensor([1000 * sigma] * 2)).sample
        x = x - 0.2 * (v[:1] + 2.0 * (v[1:] - v[:1]))
    assert relative_error(found, x) <= 1e-5


def test_each_layout_has_its_scheduler(folder):
    opened = SanaDecoderCheckpoint.open(folder)
    assert (opened.layout, opened.scheduler) in {("siglip2_sana", "dpmsolver++"), ("reconstruction", "euler")}
    assert opened.positions == "sincos" and opened.side == 16 and opened.embedding_width == 64


def test_timesteps_are_those_of_the_reference():
    assert dpm_timestep(dpm_sigmas(10)[:-1]).tolist() == [999, 963, 922, 874, 817, 749, 666, 562, 428, 249]
    assert dpm_timestep(dpm_sigmas(30)[:-1]).tolist() == [
        999, 988, 976, 963, 950, 937, 922, 907, 891, 874, 856, 837, 817, 796, 773, 749, 723, 696, 666, 634, 599, 562, 521, 476, 428, 374,
        315, 249, 176, 93,
    ]  # fmt: skip


@torch.inference_mode()
def test_pictures_in_one_batch_equal_single_ones(decoder, numbers, relative_error):
    null, source = numbers["encoder.pooled"].split(1)
    both = torch.cat((source, 2 * source))
    together = decoder.sample_latents(both, null.expand(2, -1, -1), numbers["noise"].expand(2, -1, -1, -1), steps=3, guidance_scale=2.0)
    for index in range(2):
        alone = decoder.sample_latents(both[index : index + 1], null, numbers["noise"], steps=3, guidance_scale=2.0)
        assert relative_error(together[index : index + 1], alone) <= 1e-4


def test_the_published_sizes_fit_the_published_tensors(monkeypatch):
    """Every name and shape of the full-size checkpoint, which comes without submodel_configs.json."""
    from blip3o_core.checkpoint.shards import TensorEntry
    from blip3o_core.variants import sana_decoder

    manifest = json.loads(MANIFEST.read_text("utf-8"))
    entries = {name: TensorEntry(name, MANIFEST, torch.float32, tuple(shape), 0, 0) for name, shape in manifest.items()
               if not isinstance(shape, int)}  # fmt: skip
    monkeypatch.setattr(sana_decoder, "open_shards", lambda folder, stem: entries)
    opened = SanaDecoderCheckpoint.open(MANIFEST.parent)
    assert opened.side == 512 and opened.factor == 32 and opened.embedding_width == 1152 and opened.latent_channels == 32
    assert sum(len(part) for part in opened.parts.values()) == len(entries) - 16 - 2 - 11  # the last block, the final norm, the head
    assert set(PUBLISHED) == {"encoder", "transformer", "vae", "scheduler"}


def test_what_is_no_sana_decoder_is_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        SanaDecoderCheckpoint.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no SigLIP2 [+] SANA decoder"):
        SanaDecoderCheckpoint.open(DATA / "sdxl" / "checkpoint")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "submodel_configs.json").write_text('{"siglip_vision": {"hidden_size": 32}, "sana_transformer": 3}', "utf-8")
    with pytest.raises(CheckpointError, match="submodel_configs.json"):
        SanaDecoderCheckpoint.open(broken)
    (broken / "submodel_configs.json").unlink()
    with pytest.raises(CheckpointError, match="SANA decoder's encoder don't fit"):  # the published sizes
        SanaDecoderCheckpoint.open(broken)


def test_float16_becomes_float32_with_a_warning(checkpoint, caplog):
    decoder = checkpoint.load(dtype=torch.float16)
    assert decoder.vae.dtype == decoder.connector[0].weight.dtype == torch.float32
    assert "overflow in float16" in caplog.text
