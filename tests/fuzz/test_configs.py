"""Configuration files: of models, decoders and tokenizers, and of training runs."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st
from PIL import Image

from blip3o_core.train.config import TrainConfig, load_config
from blip3o_core.train.options import known_keys

from .damage import ODD_NUMBERS, ODD_TEXTS, byte_changes, changed, damaged, json_changes, odd_values, remake

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT, SANA, EVA = DATA / "sdxl" / "checkpoint", DATA / "sana" / "checkpoint", DATA / "sdxl" / "eva_clip_vision_tower"
DECODER = "diffusion-decoder"
FILES = ("config.json", f"{DECODER}/unet/config.json", f"{DECODER}/vae/config.json", f"{DECODER}/scheduler/scheduler_config.json")
TOKENIZER = ("tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.json")
RAW = st.one_of(st.none(), st.none(), st.none(), st.none(), byte_changes())


OURS = {"image_side": 56, "drawing": {"steps": 2, "guidance_scale": 2.0, "width": 64}, "gen_vision_config": {"head_width": 12}}
"""Keys of config.json that only models made with this package have."""


def document(file: Path, changes, raw) -> bytes:
    """A configuration with changed values, as text or, where `raw` says so, with changed bytes."""
    whole = json.loads(file.read_text("utf-8")) | (OURS if file == CHECKPOINT / "config.json" else {})
    text = json.dumps(changed(whole, changes)).encode()
    return text if raw is None else damaged(text, raw)


@pytest.mark.parametrize("file", FILES, ids=["model", "unet", "vae", "scheduler"])
def test_the_configuration_of_a_model(fuzz, worker, tmp_path, file):
    def check(changes, raw):
        folder = remake(tmp_path / "model", CHECKPOINT, {file: document(CHECKPOINT / file, changes, raw)})
        return worker(fuzz, "checkpoint", folder=str(folder))

    fuzz(check, ci=10, nightly=80, changes=json_changes(), raw=RAW)


@pytest.mark.parametrize("file", ["config.json", "submodel_configs.json"])
def test_the_configuration_of_a_sana_decoder(fuzz, worker, tmp_path, file):
    def check(changes, raw):
        folder = remake(tmp_path / "decoder", SANA, {file: document(SANA / file, changes, raw)})
        return worker(fuzz, "sana_decoder", folder=str(folder))

    fuzz(check, ci=8, nightly=100, changes=json_changes(), raw=RAW)


def test_the_configuration_of_a_vision_tower(fuzz, worker, tmp_path):
    def check(changes, raw):
        folder = remake(tmp_path / "tower", EVA, {"config.json": document(EVA / "config.json", changes, raw)})
        return worker(fuzz, "vision_tower", path=str(folder))

    fuzz(check, ci=12, nightly=80, changes=json_changes(), raw=RAW)


def test_the_files_of_a_tokenizer(fuzz, worker, tmp_path):
    def check(file, changes, raw):
        if file == "tokenizer.json":  # which the checkpoint doesn't have, but would be read first
            content = damaged(json.dumps(changed(json.loads((CHECKPOINT / "vocab.json").read_text("utf-8")), changes)).encode(), raw or [])
        elif file.endswith(".txt"):
            content = damaged((CHECKPOINT / file).read_bytes(), raw or [])
        else:
            content = document(CHECKPOINT / file, changes, raw)
        return worker(fuzz, "checkpoint", folder=str(remake(tmp_path / "model", CHECKPOINT, {file: content})))

    fuzz(check, ci=16, nightly=150, file=st.sampled_from(TOKENIZER), changes=json_changes(), raw=st.one_of(st.none(), byte_changes()))


VALUES = st.one_of(
    st.sampled_from([repr(number) for number in ODD_NUMBERS]), st.sampled_from([text for text in ODD_TEXTS if text.isprintable()]),
    st.sampled_from(["true", "[]", "{}", "[1, 2]", '["dit"]', '""', "'''", "1979-05-27", "0x10", "1_000", '{a = 1}', "[[", "=", "#",
                     '"lora"', '"full"', '["latent_queries"]', '["backbone"]', '["vae"]', '"text"', '"edit"', '"contrast"', '"muon"',
                     '"webdataset"', '"bf16"']),
    st.text(max_size=20),
)  # fmt: skip
MEMORY = 4 * 2**30
"""What a run may take: a batch or a rank is as large as somebody says. More is no memory, which is an error of its own."""
KEYS = st.sampled_from([".".join(key) for key in known_keys(TrainConfig)])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A run that is right: three pictures, the tiny model."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} wall", "utf-8")
    file = folder / "run.toml"
    file.write_text(f"""[model]
path = {json.dumps(str(CHECKPOINT))}
vision_encoder = {json.dumps(str(EVA))}
[train]
batch_size = 2
steps = 5
device = "cpu"
[[data]]
path = {json.dumps(str(folder))}
[output]
folder = {json.dumps(str(folder / "out"))}
""", "utf-8")
    assert load_config(file).train.steps == 5
    return file


def test_the_options_of_a_training_run(fuzz, worker, run_file, tmp_path):
    """Overrides of the command line, and changed bytes of the file."""
    whole = run_file.read_bytes()

    def check(pairs, raw):
        file = tmp_path / "run.toml"
        file.write_bytes(whole if raw is None else damaged(whole, raw))
        overrides = [f"{key}={value}" for key, value in pairs]
        return worker(fuzz, "training_options", file=str(file), overrides=overrides, allowed_bytes=MEMORY)

    pairs = st.lists(st.tuples(st.one_of(KEYS, KEYS, KEYS, st.text(max_size=12)), VALUES), max_size=3)
    fuzz(check, ci=40, nightly=300, pairs=pairs, raw=RAW)


def test_sections_of_a_training_file(fuzz, worker, run_file, tmp_path):
    """What JSON and TOML can both say, anywhere in the file."""
    from blip3o_core.train.options import read_toml

    values = read_toml(run_file)

    def check(changes):
        file = tmp_path / "run.toml"
        file.write_text(toml(changed(values, changes)), "utf-8", errors="surrogatepass")
        return worker(fuzz, "training_options", file=str(file), overrides=[], allowed_bytes=MEMORY)

    fuzz(check, ci=16, nightly=150, changes=json_changes(odd_values()))


def toml(document: dict) -> str:
    """As far as TOML goes: keys in quotes, everything inline."""
    def value(item) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(own)}" for key, own in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item, ensure_ascii=False).replace("Infinity", "inf").replace("NaN", "nan")

    return "\n".join(f"{json.dumps(key)} = {value(own)}" for key, own in document.items()) + "\n"
