"""Data sets of shapes are read by the trainer's readers, resumed shard by shard, and the same for the same seed."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip3o_core.data.open import open_dataset
from blip3o_core.data.sample import TASKS
from blip3o_core.errors import DataError, InputError
from blip3o_core.shapes import datasets
from blip3o_core.shapes.datasets import described_scene, samples, write_datasets
from blip3o_core.shapes.detector import detect
from blip3o_core.shapes.holdout import is_held_out
from blip3o_core.shapes.world import BACKGROUNDS

NEEDS_TRAIN = "tars are read with the extra train, which the environments of ComfyUI don't have"
COUNT = 6
SHARD = 4  # a full shard and a part of one


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(datasets, "SHARD_SAMPLES", SHARD)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_by_its_reader(tmp_path, task):
    if task != "text":
        pytest.importorskip("webdataset", reason=NEEDS_TRAIN)
    path = write_datasets(tmp_path, seed=1, counts={task: COUNT})[task]
    dataset = open_dataset(str(path / "*.tar") if path.is_dir() else str(path), format="auto", task=task)
    found = [dataset.sample(index) for index in range(len(dataset))] if task == "text" else list(dataset.stream(0, 0, 1))
    assert len(found) == COUNT
    for sample in found:
        assert sample.task == task  # no BrokenSample
        assert bool(sample.text) == (task in ("text_to_image", "contrast", "edit"))
        assert bool(sample.turns) == (task in ("understand", "text"))
        assert len(sample.images) == (task in ("edit", "reconstruct", "understand", "segment"))
        assert (sample.target is not None) == (task not in ("understand", "text"))
        for content in (*sample.images, *filter(None, [sample.target])):
            picture = Image.open(io.BytesIO(content))
            assert (picture.size, picture.mode) == ((128, 128), "RGB")
            assert task in ("decode", "segment") or not is_held_out(detect(picture))  # these hold doodles and maps of labels
    assert len({(sample.text, sample.turns, sample.target) for sample in found}) > 1


def test_conversations_ask_and_answer_in_turn(tmp_path):
    pytest.importorskip("webdataset", reason=NEEDS_TRAIN)
    path = write_datasets(tmp_path, seed=2, counts={"understand": 20})["understand"]
    for sample in open_dataset(str(path / "*.tar"), format="auto", task="understand").stream(0, 0, 1):
        assert [role for role, _ in sample.turns] == ["user", "assistant"] * (len(sample.turns) // 2)
        assert not any("<image>" in text for _, text in sample.turns)
    with tarfile.open(path / "00000.tar") as tar:
        first = json.load(tar.extractfile("00000000.json"))["conversations"]
    assert first[0]["value"].startswith("<image>\n") and first[0]["from"] == "human" and first[1]["from"] == "gpt"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    counts = {"text_to_image": COUNT, "text": COUNT}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_datasets(tmp_path / name, seed=seed, counts=counts)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys() == {"shapes.json", "text.jsonl", "text_to_image/00000.tar", "text_to_image/00001.tar"}
    assert not any(one[name] == three[name] for name in one)


def test_tasks_do_not_share_their_pictures():
    first, second = (next(samples(task, 0, 0, 1))["png"] for task in ("reconstruct", "decode"))
    assert first != second


def test_an_interrupted_run_goes_on_and_keeps_what_was_written(tmp_path, monkeypatch):
    counts = {"text_to_image": 3 * SHARD}
    write_datasets(tmp_path / "whole", seed=5, counts=counts)
    made = datasets._MAKERS["text_to_image"]
    calls = []

    def dies(rng):
        calls.append(1)
        if len(calls) == SHARD + 2:
            raise KeyboardInterrupt
        return made(rng)

    monkeypatch.setitem(datasets._MAKERS, "text_to_image", dies)
    with pytest.raises(KeyboardInterrupt):
        write_datasets(tmp_path / "broken", seed=5, counts=counts)
    assert set(contents(tmp_path / "broken")) == {"shapes.json", "text_to_image/00000.tar"}  # no half shard
    write_datasets(tmp_path / "broken", seed=5, counts=counts)
    assert len(calls) == SHARD + 2 + 2 * SHARD  # the first shard was not made again
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_folder_with_other_data_is_refused(tmp_path):
    write_datasets(tmp_path, seed=1, counts={"text": 2})
    with pytest.raises(DataError, match="holds other data .*\"seed\": 1.*Give an empty folder"):
        write_datasets(tmp_path, seed=2, counts={"text": 2})


def test_unknown_tasks_and_empty_ones_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="paint = 3: give at least one sample, of the tasks text_to_image"):
        write_datasets(tmp_path / "new", seed=1, counts={"paint": 3})
    with pytest.raises(InputError, match="edit = 0"):
        write_datasets(tmp_path / "new", seed=1, counts={"edit": 0})
    assert not (tmp_path / "new").exists()


def test_pictures_show_what_their_texts_tell():
    """Of the texts only the words that can be counted: a colour in the text is in the picture."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene, text = described_scene(rng)
        words = set(text.lower().replace("sky blue background", "").replace(",", " ").replace(".", " ").replace(";", " ").split())
        shown = {thing.colour for thing in scene.objects} | {scene.background}
        assert not is_held_out(scene)
        assert words & {"red", "green", "blue", "yellow", "purple", "orange"} - ({"blue"} if scene.background == "sky" else set()) <= shown


def test_edit_records_hold_an_instruction(tmp_path):
    path = write_datasets(tmp_path, seed=1, counts={"edit": 2})["edit"]
    with tarfile.open(path / "00000.tar") as tar:
        suffixes = ("json", "source.png", "target.png", "labels.png")
        assert tar.getnames() == [f"0000000{n}.{suffix}" for n in range(2) for suffix in suffixes]
        assert list(json.load(tar.extractfile("00000000.json"))) == ["instruction"]


def test_the_decoder_sees_empty_pictures_too():
    pictures = [Image.open(io.BytesIO(members["png"])) for members in samples("decode", 0, 0, 200)]
    empty = sum(len(picture.getcolors(128 * 128)) == 1 for picture in pictures)
    assert 2 <= empty <= 16


def test_pictures_to_be_drawn_come_with_maps_of_labels():
    for task, picture in (("text_to_image", "png"), ("edit", "target.png"), ("reconstruct", "png")):
        for members in samples(task, 0, 0, 5):
            labels, pixels = (np.asarray(Image.open(io.BytesIO(members[name]))) for name in ("labels.png", picture))
            [ground] = set(labels[labels[:, :, 0] == 0][:, 1].tolist())
            assert (np.abs(pixels[labels[:, :, 0] == 0].astype(int) - list(BACKGROUNDS.values())[ground - 9]).max(axis=1) < 3).mean() > 0.9
