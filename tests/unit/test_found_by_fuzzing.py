"""What fuzzing has found (tests/fuzz), each as a case of its own: errors that nobody had written down, hangs, floods of memory."""

import base64
import json
import os
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blip3o_core import Blip3oPipeline, images
from blip3o_core.checkpoint.json_files import read_table
from blip3o_core.checkpoint.shards import open_shards, read_header
from blip3o_core.cli.main import main
from blip3o_core.errors import CheckpointError, ConfigError, InputError, TrainingError, readable
from blip3o_core.images import load_image
from blip3o_core.lora.files import read_lora
from blip3o_core.lora.peft_folder import read_peft_folder
from blip3o_core.models.qwen2_5_vl import text_config, vision_config
from blip3o_core.pipelines.chat import Chat
from blip3o_core.train.command import main as train
from blip3o_core.train.config import load_config
from blip3o_core.train.state import OPTIMIZER, load_optimizer
from blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_core.variants.eva_clip import EvaClipCheckpoint
from blip3o_core.variants.sana_decoder import SanaDecoderCheckpoint
from blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint

SANA = Path(__file__).parents[1] / "data" / "sana" / "checkpoint"
AT_ONCE_S = 20  # what was a hang takes a moment; the rest is for slow machines


@pytest.fixture(autouse=True)
def at_once():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < AT_ONCE_S


def write_header(file: Path, header: dict, data: bytes = bytes(8)) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.mark.parametrize("changes", [
    {"shape": [float("inf")]}, {"shape": [2.0]}, {"shape": "2"}, {"shape": [True, 2]}, {"shape": None}, {"data_offsets": [0, 8.0]},
    {"data_offsets": [-(10**30), 8]}, {"dtype": []},
])  # fmt: skip
def test_a_header_with_sizes_that_are_no_whole_numbers(tmp_path, changes):
    file = write_header(tmp_path / "a.safetensors", {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}})
    with pytest.raises(CheckpointError, match="a.safetensors: "):
        read_header(file)


def test_numbers_of_thousands_of_digits(tmp_path):
    text = b'{"x": ' + b"9" * 5000 + b"}"
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="the safetensors header is damaged"):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read_table(tmp_path / "a.json")


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_lora(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        read_table(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("name", ["model.dit.model.layers.999999999.gate", "model.dit.model.layers.3.x.gate"])
def test_a_layer_far_behind_the_others(checkpoint_copy, edit_tensors, name):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(0)}))
    with pytest.raises(CheckpointError, match="sizes can't be read|don't fit its configuration"):
        Blip3oCheckpoint.open(checkpoint_copy)


def test_a_diffusion_transformer_without_heads(checkpoint_copy, edit_tensors):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({"model.dit.model.layers.0.gate": torch.zeros(0)}))
    with pytest.raises(CheckpointError, match="without size"):
        Blip3oCheckpoint.open(checkpoint_copy)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**9}, "not a whole number from 1 to 1000"),
    ({"num_hidden_layers": 1000}, "num_hidden_layers is 1000, but there are only"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"num_key_value_heads": 3}, "don't divide"), ({"rope_scaling": [1]}, "rope_scaling is"),
    ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, "half of a head"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None"), ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"hidden_act": ["silu"]}, "hidden_act is"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"), ({"text_config": 5}, "text_config is 5"),
    ({"vocab_size": 2**62}, "vocab_size is"),
    ({"drawing": 5}, "drawing is 5"), ({"drawing": {"solver": []}}, "drawing.solver"), ({"drawing": {"width": 0}}, "drawing.width"),
    ({"image_side": 28 * 10**6}, "image_side is"),
])  # fmt: skip
def test_a_configuration_of_nonsense(checkpoint_copy, changes, message):
    file = checkpoint_copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        Blip3oCheckpoint.open(checkpoint_copy)


@pytest.mark.parametrize(("changes", "message"), [
    ({"in_channels": 0.5}, "in_channels is 0.5, not 3"), ({"patch_size": 16}, "patch_size is 16, not 14"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"window_size": 100}, "not a multiple of 28"), ({"fullatt_block_indexes": 1}, "not a list of blocks"),
    ({"hidden_act": {}}, "hidden_act is"),
    ({"depth": -1}, "depth is -1"), ({"hidden_size": 30}, "multiples of 4"),
])  # fmt: skip
def test_a_vision_tower_of_nonsense(tiny_checkpoint, changes, message):
    config = json.loads((tiny_checkpoint / "config.json").read_text("utf-8"))
    with pytest.raises(CheckpointError, match=message):
        vision_config({"vision_config": {**config["vision_config"], **changes}}, "config.json")
    assert vision_config(config, "config.json").depth == 2 and text_config(config, "config.json").num_hidden_layers == 3


def test_a_vision_tower_without_end(checkpoint_copy):
    file = checkpoint_copy / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["vision_config"]["depth"] = 1000
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="depth is 1000, but there are only"):
        Blip3oCheckpoint.open(checkpoint_copy).load_vision_tower(dtype=torch.float32)


@pytest.mark.parametrize(("part", "changes", "message"), [
    ("unet", {"layers_per_block": 10**9}, "layers_per_block is"), ("unet", {"downsample_padding": 10**6}, "downsample_padding is"),
    ("unet", {"downsample_padding": True}, "downsample_padding is True"),
    ("unet", {"down_block_types": "CrossAttnDownBlock2D"}, "makes no sense"),
    ("unet", {"block_out_channels": [32] * 10**5}, "block_out_channels is"),
    ("unet", {"norm_num_groups": "x"}, "makes no sense"), ("unet", {"mid_block_scale_factor": 0}, "mid_block_scale_factor is 0"),
    ("vae", {"norm_num_groups": "8"}, "makes no sense"), ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae", {"latents_mean": [1]}, "latents_mean"),
    ("scheduler", {"use_karras_sigmas": None}, "use_karras_sigmas is None"),
    ("scheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps is"),
    ("scheduler", {"beta_end": "x"}, "makes no sense"), ("scheduler", {"beta_start": float("nan")}, "makes no sense"),
    ("scheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
])  # fmt: skip
def test_a_decoder_of_nonsense(checkpoint_copy, part, changes, message):
    file = checkpoint_copy / "diffusion-decoder" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        SdxlDecoderCheckpoint.open(checkpoint_copy)


@pytest.mark.parametrize(("part", "changes", "message"), [
    ("siglip_vision", {"num_attention_heads": 1552}, "1552 heads don't divide a width of 64"),
    ("siglip_vision", {"num_hidden_layers": "3"}, "num_hidden_layers is '3'"), ("siglip_vision", 5, "no table of settings"),
    ("sana_transformer", {"num_layers": 10**9}, "num_layers is"), ("sana_transformer", {"sample_size": 10**6}, "sample_size is"),
    ("sana_transformer", {"mlp_ratio": float("inf")}, "mlp_ratio is inf"),
    ("autoencoder_dc", {"scaling_factor": None}, "scaling_factor is None"),
    ("autoencoder_dc", {"decoder_block_out_channels": [16] * 10**5}, "decoder_block_out_channels is"),
    ("scheduler", {"flow_shift": "3"}, "flow_shift is"),
])  # fmt: skip
def test_a_sana_decoder_of_nonsense(tmp_path, part, changes, message):
    (tmp_path / "model.safetensors").symlink_to(SANA / "model.safetensors")
    (tmp_path / "config.json").symlink_to(SANA / "config.json")
    config = json.loads((SANA / "submodel_configs.json").read_text("utf-8"))
    config[part] = {**config[part], **changes} if isinstance(changes, dict) else changes
    (tmp_path / "submodel_configs.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        SanaDecoderCheckpoint.open(tmp_path)


def test_an_index_that_is_none(checkpoint_copy):
    for content, message in (('{"weight_map": {"a": 5}}', "not an index of shards"),
                             ('{"weight_map": {"a": "C:model.safetensors"}}', "outside of its own"),
                             (json.dumps({"weight_map": {"a": "[" * 300}}), "which no file can be called"),
                             ('{"weight_map": {"a": "model.safetensors.index.json"}}', "not a safetensors file")):  # fmt: skip
        (checkpoint_copy / "model.safetensors.index.json").write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match=message):
            open_shards(checkpoint_copy, "model")


def test_a_pattern_of_peft_that_would_never_be_matched(tmp_path):
    layer = "layers.0.attn1.to_q"
    save_file({f"base_model.model.{layer}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"(([a-z0-9.]+)+)+x": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="too intricate"):
        read_peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {r"layers\.\d+\.attn1.to_q": 8}}), "utf-8")
    assert read_peft_folder(tmp_path).adapters["dit"][layer].alpha == 8


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_with_transparent_colours_but_no_colours(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)) + chunk(b"tRNS", bytes(4))
                     + chunk(b"IDAT", zlib.compress(bytes(2))) + chunk(b"IEND", b""))  # fmt: skip
    try:
        assert load_image(file).size == (1, 1)
    except InputError as error:
        assert "the picture is damaged" in str(error)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "PA", "P", "I;16", "I", "F"])
def test_pictures_in_strips_are_the_same(tmp_path, monkeypatch, mode):
    """Large ones with transparency or wide greys are converted in strips, for memory; each strip may be a row, or all rows."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (37, 23, 4), np.uint8), "RGBA")
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(random.integers(0, 60_000, (37, 23)).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    elif mode in ("La", "LA"):
        image = image.convert("LA").convert(mode)
    elif mode in ("P", "PA"):
        image = image.convert("RGB").quantize(16).convert(mode)
        image.info["transparency"] = 3
    whole = images.to_rgb_images(image)[0]
    for pixels in (1, 23 * 5, 23 * 37 + 1):
        monkeypatch.setattr(images, "STRIP_PIXELS", pixels)
        assert images.to_rgb_images(image)[0].tobytes() == whole.tobytes()
    if mode == "RGBA":
        assert whole.tobytes() == Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").tobytes()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_a_conversation_starts_no_other_program(pipe):
    """Pillow would start Ghostscript for a drawing; what is in a saved chat comes from anywhere."""
    message = {"role": "system", "text": "s", "images": [base64.b64encode(POSTSCRIPT).decode()], "min_pixels": None, "max_pixels": None,
               "ids": None}  # fmt: skip
    with pytest.raises(InputError, match="this is no saved conversation.*an EPS drawing"):
        Chat.from_json(pipe, json.dumps({"format": "blip3o-chat-1", "messages": [message]}))


def test_messages_are_text_that_can_be_read():
    assert readable("a\x1b[2J\n\tb\x9b\u202e\ud800 é 漢") == "a\\x1b[2J\n\tb\\x9b\\u202e\\ud800 é 漢"
    assert str(InputError("\x1b]0;title\x07")) == "\\x1b]0;title\\x07"
    long = str(InputError(f"{'a' * 5000}.png: {'b ' * 5000}the end"))
    assert len(long) < 5000 and long.startswith("aaa") and "a.png: b b" in long and long.endswith("b b the end")


def test_control_characters_in_names_of_tensors_and_settings(checkpoint_copy, edit_tensors):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({"\x1b[31mred": torch.zeros(1)}))
    with pytest.raises(CheckpointError) as caught:
        Blip3oPipeline.from_pretrained(checkpoint_copy)
    assert "\\x1b[31mred" in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("token_id", [2**31 - 1, -1, "5", None])
def test_a_vocabulary_that_would_end_the_process(checkpoint_copy, token_id):
    file = checkpoint_copy / "vocab.json"
    vocabulary = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**vocabulary, next(iter(vocabulary)): token_id}), "utf-8")
    with pytest.raises(CheckpointError, match="vocab.json: the id of the token .* is .*, not a number below"):
        Blip3oPipeline.from_pretrained(checkpoint_copy, device="cpu")


def test_a_number_of_thousands_of_digits_as_an_option():
    with pytest.raises(ConfigError, match="train.steps"):
        load_config(None, ["train.steps=" + "9" * 5000])


def test_brackets_without_end_in_a_training_file_or_option(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("a = " + "[" * 5000, "utf-8")
    with pytest.raises(ConfigError, match="hundreds of brackets inside each other"):
        load_config(file)
    with pytest.raises(ConfigError, match="train.steps"):
        load_config(None, ["train.steps=" + "[" * 5000])


@pytest.mark.parametrize("arguments", [["generate", "a cat", "--model"], ["ask", "What?", "--image"], ["inspect"]])
def test_a_name_that_no_file_can_have(arguments, capsys):
    assert main([*arguments, "n" * 5000]) == 1
    told = capsys.readouterr().err
    assert len(told) < 1500 and "Traceback" not in told, told


def test_a_name_that_no_file_can_have_in_a_training_run(tiny_checkpoint, capsys):
    assert train([f"model.path={tiny_checkpoint}", "data.0.path=" + "n" * 5000, "output.folder=out", "--dry-run"]) == 1
    assert "no file or folder can have so long a name" in capsys.readouterr().err


@pytest.mark.parametrize("instructions", [b"}r\x00\x00", b"}J\x00", b"X\xff\xff\xff\x7f", b"}h\x07.", b"0."])
def test_a_pickle_that_ends_in_the_middle_of_an_instruction(tmp_path, instructions):
    file = tmp_path / OPTIMIZER
    torch.save({"pos_embed": torch.zeros(2)}, file)
    with zipfile.ZipFile(file) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w") as damaged:
        for name, content in parts.items():
            damaged.writestr(name, b"\x80\x02" + instructions if name.endswith("data.pkl") else content)
    with pytest.raises(TrainingError, match="damaged"):
        load_optimizer(tmp_path)
    with pytest.raises(CheckpointError, match="damaged or cut off|refused"):
        EvaClipCheckpoint.open(file.rename(tmp_path / "pytorch_model.bin"))
