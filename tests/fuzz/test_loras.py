"""LoRA files and the folders of peft: damaged, for other layers, with metadata of nonsense."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from blip3o_core.lora.files import write_lora
from blip3o_core.lora.peft_folder import write_peft_folder
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..unit.lora_samples import random_lora
from .damage import byte_changes, changed, damaged, header_changes, json_changes, odd_values, remake, with_header, with_tensor

CHECKPOINT = Path(__file__).parents[1] / "data" / "sdxl" / "checkpoint"
KINDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_A.default.weight", "alpha", "dora_scale", "diff", "diff_b", "weight",
         "lora_magnitude_vector", "hada_w1_a")  # fmt: skip
PLACES = ("diffusion_model.layers.0.attn1.to_q", "language_model.layers.0.self_attn.q_proj", "base_model.model.layers.0.attn1.to_q",
          "diffusion_model.layers.99999999999.attn1.to_q", "layers.0", "", "latent_queries", "transformer." * 2000)  # fmt: skip
NAMES = st.builds("{}.{}".format, st.one_of(st.sampled_from(PLACES), st.text(max_size=20)),
                  st.one_of(st.sampled_from(KINDS), st.text(max_size=9)))  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def whole(request, tmp_path_factory) -> Iterator[bytes]:
    file = tmp_path_factory.mktemp("lora") / "whole.safetensors"
    write_lora(file, random_lora(Blip3oCheckpoint.open(CHECKPOINT), dora=request.param))
    yield file.read_bytes()


def test_bytes_of_a_lora(fuzz, worker, whole, tmp_path):
    def check(changes):
        (tmp_path / "it.safetensors").write_bytes(damaged(whole, changes))
        return worker(fuzz, "lora", path=str(tmp_path / "it.safetensors"))

    fuzz(check, ci=12, nightly=100, changes=byte_changes())


def test_headers_of_a_lora(fuzz, worker, whole, tmp_path):
    def check(changes):
        (tmp_path / "it.safetensors").write_bytes(with_header(whole, changes))
        return worker(fuzz, "lora", path=str(tmp_path / "it.safetensors"))

    fuzz(check, ci=12, nightly=125, changes=header_changes())


def test_names_in_a_lora(fuzz, worker, whole, tmp_path):
    def check(name):
        (tmp_path / "it.safetensors").write_bytes(with_tensor(whole, name))
        return worker(fuzz, "lora", path=str(tmp_path / "it.safetensors"))

    fuzz(check, ci=8, nightly=50, name=NAMES)


def test_a_folder_of_peft(fuzz, worker, tmp_path):
    source = tmp_path / "source"
    write_peft_folder(source, random_lora(Blip3oCheckpoint.open(CHECKPOINT), parts=("dit",)))
    config = json.loads((source / "adapter_config.json").read_text("utf-8"))

    def check(changes, raw):
        text = json.dumps(changed(config, changes)).encode()
        folder = remake(tmp_path / "folder", source, {"adapter_config.json": text if raw is None else damaged(text, raw)})
        return worker(fuzz, "peft_folder", path=str(folder))

    fuzz(check, ci=16, nightly=100, changes=json_changes(st.one_of(odd_values(), st.sampled_from(["LORA", "LOHA", "all", "pissa"]))),
         raw=st.one_of(st.none(), st.none(), st.none(), byte_changes()))  # fmt: skip
