"""The configuration: every mistake is refused with the key, what it was, and what to write; what is printed can be read again."""

import dataclasses
import re
import sys
import typing
from pathlib import Path

import pytest

from blip3o_core.errors import ConfigError
from blip3o_core.train import options
from blip3o_core.train.command import main
from blip3o_core.train.config import TrainConfig, as_dict, differences, load_config, print_config

TOML = options._toml_module()  # tomllib, or tomli on Python 3.10
FULL = ["train.method=full", 'train.parts=["dit"]']


def refused(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("word, message", [
    ("lora.rnk=8", "lora.rnk: unknown key. Did you mean lora.rank?"),
    ("lroa.rank=8", "lroa: unknown key. Did you mean lora?"),
    ("train.learning_rate=1", "train.learning_rate: unknown key. Did you mean optimizer.learning_rate?"),
    ("rank=8", "rank: unknown key. Did you mean lora.rank?"),
    ("loader.batch_sise=8", "loader.batch_sise: unknown key. Did you mean train.batch_size?"),
    ("data.0.captoin_dropout=0.1", "data.0.captoin_dropout: unknown key. Did you mean data.0.caption_dropout?"),
    ("validation.data.0.pth=x", "validation.data.0.pth: unknown key. Did you mean validation.data.0.path?"),
    ("loader.xyzzy=1", "loader.xyzzy: unknown key. Known keys here: workers, max_broken, max_pixels, max_tokens."),
    ("objective.weights.edti=1", "objective.weights.edti: unknown key. Did you mean edit? Known: text_to_image, edit,"),
])  # fmt: skip
def test_unknown_keys_name_the_nearest_valid_one(word, message):
    assert refused(word).startswith(message)


@pytest.mark.parametrize("word, message", [
    ("train.steps=many", "train.steps: 'many' is text, expected a whole number, for instance 1."),
    ("train.steps=1.5", "train.steps: 1.5 is a number, expected a whole number"),
    ("train.steps=true", "train.steps: True is true or false, expected a whole number"),
    ("cache.enabled=1", "cache.enabled: 1 is a whole number, expected true or false"),
    ("optimizer.learning_rate=high", "optimizer.learning_rate: 'high' is text, expected a number, for instance 0.5."),
    ("lora.parts=dit", "lora.parts: 'dit' is not a list. Write [\"dit\"]."),
    ("lora.parts=[1]", "lora.parts.0: 1 is a whole number, expected text"),
    ("objective.weights=2", "objective.weights: 2 is not a table. Write {name = value}."),
    ("train=3", "train: 3 is not a section. Write [train]"),
    ("data.path=pics", "data: there may be several of these. Write [[data]] in the file, data.0.path=... on the command line."),
    ("train.steps.x=3", "train.steps: {'x': 3} is a section, expected a whole number"),
])  # fmt: skip
def test_values_of_another_type_are_refused(word, message):
    assert refused(word).startswith(message)


@pytest.mark.parametrize("word, message", [
    ("train.steps=0", "train.steps: 0 is out of range. It must be at least 1."),
    ("lora.dropout=1", "lora.dropout: 1.0 is out of range. It must be 0 to 0.95."),
    ("optimizer.beta2=1", "optimizer.beta2: 1.0 is out of range. It must be 0 to 0.999999."),  # AdamW raises at 1
    ("optimizer.epsilon=0", "optimizer.epsilon: 0.0 is out of range. It must be at least 1e-20."),  # 0 / 0 at the first update
    ("optimizer.learning_rate=nan", "optimizer.learning_rate: nan is out of range. It must be 0 to 1000."),
    ("objective.logit_mean=inf", "objective.logit_mean: inf is out of range. It must be a finite number."),
    ("objective.weights.edit=-1", "objective.weights.edit: -1.0 is out of range. It must be at least 0."),
    ("train.method=finetune", "train.method: 'finetune' is unknown. Use one of lora, full."),
    ("train.method=lorra", "train.method: 'lorra' is unknown. Did you mean lora?"),
    ('lora.parts=["unet"]', "lora.parts.0: 'unet' is unknown. Use one of dit, language_model."),
    ("data.0.task=text2image", "data.0.task: 'text2image' is unknown. Did you mean text_to_image?"),
])  # fmt: skip
def test_values_out_of_range_are_refused(word, message):
    assert refused(word).startswith(message)


@pytest.mark.parametrize("words, message", [
    (["train.method=full"], "train.parts is empty, but train.method is full"),
    (['train.parts=["dit"]'], 'train.parts is for train.method = "full"'),
    ([*FULL, 'train.fresh=["vae"]'], "train.fresh has vae, which doesn't train"),
    (["lora.parts=[]"], "lora.parts is empty: nothing would train"),
    (["lora.dit_targets=[]"], "lora.dit_targets is empty, but lora.parts has dit"),
    (["samples.every=10"], "samples.every is set, but samples.prompts is empty"),
    (['samples.prompts=["a", "b"]', 'samples.images=["x.png"]'], "samples.images has 1 entries for 2 samples.prompts"),
    (["optimizer.name=prodigy"], "optimizer.name is prodigy.*nothing would be learned. Set it to 1"),
    (["optimizer.warmup_steps=11", "train.steps=10"], "warmup_steps = 11 is more than train.steps = 10"),
    (["output.name=loras/fox"], "output.name: 'loras/fox' can't be the name of a LoRA file.*without folder"),
    (["output.name=trained"], "trained and ema are taken"),  # would replace trained.safetensors of every checkpoint
    (["output.name=fox.safetensors"], r"without \.safetensors"),
    (["data.0.task=reconstruct", "data.0.trigger=xyz"], "data.0.trigger: the task reconstruct has no captions"),
    (["data.0.task=understand", "data.0.caption_dropout=0.1"], "data.0.caption_dropout: has no effect on the task understand"),
    (["data.0.task=edit", "data.0.flip=0.5"], "data.0.flip: mirrored pictures contradict the words left and right"),
    (["data.0.task=edit", "data.0.crop=random"], "source and target would show different parts"),
    (["train.compile=true", "train.gradient_checkpointing=true"], "don't work together"),
    (["data.0.weight=2", "data.0.repeats=3"], "data.0: weight = 2 and repeats = 3 contradict each other"),
    (["data.0.format=folder", "data.0.samples=3"], "data.0.samples is only for tars"),
    (["validation.data.0.task=text", "validation.data.0.flip=1"], "validation.data.0.flip: the task text has no pictures"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(words, message):
    assert re.search(message, refused(*words))


@pytest.mark.parametrize("words, message", [
    ([], "model.path is not set"), (["model.path=m"], r"there is no \[\[data\]\] section"),
    (["model.path=m", "data.0.task=edit"], "data.0.path is not set"),
    (["model.path=m", "data.0.path=x", "validation.data.0.task=edit"], "validation.data.0.path is not set"),
])  # fmt: skip
def test_a_run_needs_a_model_and_data(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, words).require_complete()


def test_overrides_reach_every_depth_and_win_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[train]\nsteps = 5\n[[data]]\npath = "a"\ntrigger = "old"\n')
    config = load_config(file, ["train.steps=2_000", "data.0.path=b", "data.1.path=c", "data.1.task=edit", "validation.data.0.path=v",
                                "objective.weights.edit=2", "optimizer.learning_rate=1e-3", 'samples.prompts=["a, b", "c=d"]'])  # fmt: skip
    assert config.train.steps == 2000
    assert [(data.path, data.task, data.trigger) for data in config.data] == [("b", "text_to_image", "old"), ("c", "edit", "")]
    assert config.validation.data[0].path == "v"
    assert config.objective.weights == {"edit": 2.0}
    assert config.optimizer.learning_rate == 1e-3
    assert config.samples.prompts == ("a, b", "c=d")


@pytest.mark.parametrize("typed", ["2024", "1e3", "true", "C:\\pictures\\new", "a b", "[draft]", "it's", '"quoted"', "a=b", ""])
def test_text_on_the_command_line_needs_no_quotes(typed):
    assert load_config(None, [f"data.0.path={typed}"]).data[0].path == typed.strip('"')


@pytest.mark.parametrize("word, message", [
    ("second.toml", "'second.toml' is no override. Write section.key=value, for instance train.steps=2000."),
    ("train..steps=1", "is no override"),
    ("data.2.path=x", "data.2.path: '2' leads nowhere. data is a list of 0, counted from 0; data.0 adds a new one. Write data.0.path=..."),
    ("data.0.path.x.y=1", "data.0.path: {'x': {'y': 1}} is a section, expected text"),
])  # fmt: skip
def test_overrides_that_lead_nowhere_are_refused(word, message):
    assert message in refused(word)


@pytest.mark.parametrize("text, line, hint", [
    ("[train]\nsteps = 5\nmethod = lora\n", 3, "Text needs quotes"),
    ("[train]\nsteps = 5\nsteps = 6\n", 3, "stands there only once"),
    ('[model]\npath = "C:\\models\\b"\n', 2, "Write Windows paths in 'single quotes'"),
])  # fmt: skip
def test_toml_mistakes_name_file_and_line(tmp_path, text, line, hint):
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refused(file=file)
    assert message.startswith(f"{file}: not valid TOML") and f"at line {line}" in message and hint in message


def test_files_that_are_missing_folders_or_no_text_are_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'[model]\npath = "\xe4"\n')
    assert "there is no such file" in refused(file=tmp_path / "none.toml")
    assert "can't be read as UTF-8 text" in refused(file=tmp_path)
    assert "can't be read as UTF-8 text" in refused(file=tmp_path / "latin.toml")


def test_one_section_where_several_may_be_teaches_the_double_brackets(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "pics"\n')
    assert "Write [[data]] in the file" in refused(file=file)


WORDS = [
    *FULL, 'train.parts=["dit", "latent_queries"]', "train.steps=77", "train.ema_decay=0.999", "optimizer.learning_rate=3e-05",
    "objective.weights={edit = 0.5, text = 2}", "data.0.path=C:\\pics", "data.1.path=näh \"x\"\t\x7f\n☃", "data.1.repeats=3",
    "validation.data.0.path=v", "validation.data.1.path=w", "validation.data.1.task=edit", 'samples.prompts=["a\\nb"]',
]  # fmt: skip


@pytest.mark.parametrize("words", [[], WORDS], ids=["defaults", "everything"])
def test_what_is_printed_is_read_again_as_the_same(tmp_path, words):
    config = load_config(None, words)
    file = tmp_path / "printed.toml"
    file.write_text(print_config(config), "utf-8")
    assert load_config(file) == config
    assert options.build(TrainConfig, as_dict(config)) == config  # as stored in checkpoints


def all_options() -> list[tuple[str, dataclasses.Field]]:
    found = []
    for field in dataclasses.fields(TrainConfig):
        hint = typing.get_type_hints(TrainConfig)[field.name]
        section = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        found += [(field.name, own) for own in dataclasses.fields(section)]
    return found


def test_print_config_shows_every_key_behind_its_documentation(capsys):
    assert main(["--print-config", "train.steps=7"]) == 0
    printed = capsys.readouterr().out
    lines = [line.lstrip("#") for line in printed.splitlines()]
    assert "steps = 7" in lines
    for section, field in all_options():
        start = lines.index(f"[[{section}]]" if section == "data" else f"[{section}]")
        place = next(place for place in range(start, len(lines)) if lines[place].startswith(f"{field.name} = "))
        documentation, above = [], place - 1
        while printed.splitlines()[above].startswith("# "):
            documentation.insert(0, lines[above].strip())
            above -= 1
        assert " ".join(documentation).startswith(" ".join(field.metadata["help"].split())), field.name
    TOML.loads(printed)


def test_the_defaults_of_all_options_are_within_their_own_limits():
    config = load_config(None)
    assert options.build(TrainConfig, as_dict(config)) == config
    for section, field in all_options():
        assert field.metadata["help"], f"{section}.{field.name}"


def test_a_resumed_run_may_change_only_what_does_not_change_the_result():
    old = as_dict(load_config(None, ["data.0.path=a"]))
    same = as_dict(load_config(None, ["data.0.path=a", "train.steps=5", "output.folder=x", "validation.every=3", "loader.workers=0"]))
    other = as_dict(load_config(None, ["data.0.path=b", "lora.rank=8", "optimizer.learning_rate=1e-3"]))
    assert differences(old, same) == []
    found = differences(old, other)
    assert len(found) == 3 and "lora.rank: 16 -> 8" in found and "optimizer.learning_rate: 0.0001 -> 0.001" in found
    assert any(line.startswith("data") and "'a'" in line and "'b'" in line for line in found)


def test_a_run_from_before_an_option_existed_goes_on_if_the_option_has_its_default():
    old = as_dict(load_config(None, ["data.0.path=a"]))
    del old["objective"]["whitening_weight"]
    assert differences(old, as_dict(load_config(None, ["data.0.path=a"]))) == []
    changed = as_dict(load_config(None, ["data.0.path=a", "objective.whitening_weight=2"]))
    assert differences(old, changed) == ["objective.whitening_weight: 0.0 -> 2.0"]


def test_python_3_10_reads_toml_with_tomli(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setattr("blip3o_core.runtime.require_package", lambda name, **_: asked.append(name) or TOML)
    assert load_config(None, ["train.steps=3"]).train.steps == 3
    assert set(asked) == {"tomli"}


def test_the_command_says_what_is_wrong_in_one_line(capsys):
    assert main(["lora.rnk=8"]) == 1
    assert capsys.readouterr().err == "train: lora.rnk: unknown key. Did you mean lora.rank?\n"
    assert main([]) == 1
    assert "train: model.path is not set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--dry-rnu"])
