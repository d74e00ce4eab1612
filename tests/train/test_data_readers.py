"""Datasets as people have them: what is read, and what is said of layouts that don't fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_core.data.broken import BrokenSample
from blip3o_core.data.open import FITTING_TASKS, open_dataset
from blip3o_core.data.records import Records
from blip3o_core.data.transforms import augment
from blip3o_core.errors import DataError


def opened(path, task: str = "text_to_image", format: str = "auto", **options):
    return open_dataset(str(path), format=format, task=task, **options)


def samples(dataset) -> list:
    found = []
    for index in range(len(dataset)):
        try:
            found.append(dataset.sample(index))
        except BrokenSample as broken:
            found.append(broken)
    return found


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name, where sub__a_png is sub/a.png."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_json(file: Path, records: list, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.suffix == ".jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records, **options), "utf-8")
    return file


def only(tmp_path: Path, task: str, record: dict, name: str = "data.json", **options):
    """The one sample of a dataset of one record behind a good one; pictures a.png and b.png are there."""
    write(tmp_path, a_png="", b_png="")
    good = {"instruction": "x", "source": "a.png", "target": "b.png"} if task == "edit" else {
        "image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}  # fmt: skip
    return opened(write_json(tmp_path / name, [good, record]), task, **options).sample(1)


# Folders


def test_a_folder_is_read_with_its_folders_in_order_of_names(tmp_path):
    write(tmp_path, b_JPG="", b_txt="\ufeffa  b\n", a_png="", a_txt="ä", sub__c_webp="", sub__c_txt="c", _hidden_png="", note_md="")
    (tmp_path / "_hidden.png").rename(tmp_path / "._a.png")
    found = samples(opened(tmp_path))
    assert [(sample.text, sample.target) for sample in found] == [
        ("ä", tmp_path / "a.png"), ("a  b", tmp_path / "b.JPG"), ("c", tmp_path / "sub" / "c.webp")]  # fmt: skip
    assert [sample.name for sample in found] == [str(sample.target) for sample in found]


@pytest.mark.parametrize("task", ["reconstruct", "decode", "autoencode"])
def test_picture_tasks_need_no_captions_and_ignore_them(tmp_path, task):
    found = samples(opened(write(tmp_path, a_png="", a_jpg="", b_png="", b_txt="b"), task))
    assert [(sample.task, sample.text) for sample in found] == [(task, "")] * 3
    assert [sample.target.name for sample in found] == ["a.jpg", "a.png", "b.png"]
    assert [len(sample.images) for sample in found] == [int(task == "reconstruct")] * 3


@pytest.mark.parametrize("caption, reason", [
    (None, "has no caption b.txt"), ("", "its caption b.txt is empty"), ("\ufeff \n", "its caption b.txt is empty"),
    (b"caf\xe9", "its caption b.txt is not UTF-8"),
])  # fmt: skip
def test_a_picture_without_a_usable_caption_is_a_broken_sample(tmp_path, caption, reason):
    write(tmp_path, a_png="", a_txt="a", b_png="", **({} if caption is None else {"b_txt": caption}))
    good, broken = samples(opened(tmp_path))
    assert good.text == "a"
    assert broken.name == str(tmp_path / "b.png") and reason in broken.reason


def test_a_file_that_is_gone_is_a_broken_sample(tmp_path):
    dataset = opened(write(tmp_path, a_png="", a_txt="a"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenSample, match="a.png: the file is gone"):
        dataset.sample(0)


@pytest.mark.parametrize("task", ["text_to_image", "contrast"])
def test_a_folder_in_which_no_picture_has_a_caption_is_refused(tmp_path, task):
    with pytest.raises(DataError, match=f"none of 2 pictures has a caption, which the task {task} needs.*beginning with a.txt"):
        opened(write(tmp_path, a_png="", b_png="", c_txt="c"), task)


def test_two_pictures_of_one_caption_are_refused(tmp_path):
    with pytest.raises(DataError, match="a.jpg and a.png would share one caption, a.txt. Rename one"):
        opened(write(tmp_path, a_png="", a_jpg="", a_txt="a"))


def test_folders_without_pictures_are_refused_with_a_hint_if_there_are_tars(tmp_path):
    with pytest.raises(DataError, match=r"holds no pictures \(.png .*\). Check the path"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"It holds tars: give .*/\*.tar"):
        opened(write(tmp_path, a_tar=""))


# Records


@pytest.mark.parametrize("lines", [b'{"n": 0}\n{"n": 1}\n', b'\xef\xbb\xbf{"n": 0}\r\n\r\n{"n": 1}', b'\n\n{"n": 0}\n\n\n{"n": 1}\n\n',
                                   b'[{"n": 0},{"n": 1}]', b'\xef\xbb\xbf [\n\t{"n": 0} ,\r\n {"n": 1}\n]\n'])  # fmt: skip
def test_records_are_found_in_lines_and_lists_of_any_spacing(tmp_path, lines):
    (tmp_path / "a").write_bytes(lines)
    records = Records(tmp_path / "a")
    assert [records.read(index) for index in range(len(records))] == [{"n": 0}, {"n": 1}]
    assert [record for _, record in records.all()] == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_of_a_list_are_found_behind_letters_of_several_bytes(tmp_path, ascii, indent):
    written = [{"text": "ä" * number + "\U0001f600", "n": number} for number in range(20)]
    records = Records(write_json(tmp_path / "a.json", written, ensure_ascii=ascii, indent=indent))
    assert [records.read(index) for index in reversed(range(len(records)))] == written[::-1]


def test_lines_are_found_across_the_chunks_in_which_the_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("blip3o_core.data.records._CHUNK_BYTES", 7)
    records = Records(write_json(tmp_path / "a.jsonl", [{"n": number} for number in range(100)]))
    assert [records.read(index)["n"] for index in range(100)] == list(range(100))


def test_many_lines_take_few_bytes_each(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"file_name": "a.png", "text": "aaaa"}\n' * 100_000)
    records = Records(tmp_path / "a.jsonl")
    assert records._starts.nbytes + records._lengths.nbytes == 12 * len(records) == 1_200_000


@pytest.mark.parametrize("name, content, message", [
    ("a.json", '[{"n": 1},\n {"n": }]', r"a.json: is no valid JSON \(line 2, column 8: Expecting value\)"),
    ("a.json", '[{"n": 1}\n {"n": 2}]', r"line 2, column 2: Expecting ',' or '\]'"),
    ("a.json", '[{"n": 1},\n', "line 2, column 1: Expecting value"),
    ("a.json", '[{"n": 1}]\n[]', r"line 1, column 11: '\[\]' after the list"),
    ("a.json", "[]", "a.json: holds no records"),
    ("a.json", "", "a.json: holds no records"),
    ("a.json", "[1]", "record 1: line 1 is a int, not an object"),
    ("a.json", '{\n"n": 1}', r"record 1: line 2 is no valid JSON .*Give a JSON list, or one JSON object per line"),
    ("a.json", b'["\xff"]', "a.json: is not UTF-8"),
    ("a.json", "[" * 100_000, "nested too deep"),
    ("a.jsonl", "\n\n\n", "a.jsonl: holds no records"),
    ("a.jsonl", "\n\noh\n", "record 1: line 3 is no valid JSON"),
    ("a.jsonl", b"{\"n\": \"\xff\"}\n", "record 1: line 1 is no valid JSON .*utf-8"),
])  # fmt: skip
def test_a_file_that_is_no_json_is_refused_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


# metadata.jsonl


@pytest.mark.parametrize("picture, caption", [("file_name", "text"), ("image", "caption"), ("image_path", "prompt")])
def test_metadata_of_imagefolder_is_read_by_any_of_its_names(tmp_path, picture, caption):
    write(tmp_path, a_png="", sub__b_png="")
    write_json(tmp_path / "metadata.jsonl", [{picture: "a.png", caption: " a ", "width": 3}, {picture: "sub/b.png", caption: "b"}])
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        found = samples(opened(path))
        assert [(sample.text, sample.target) for sample in found] == [("a", tmp_path / "a.png"), ("b", tmp_path / "sub" / "b.png")]
    assert found[1].name == f"{tmp_path / 'metadata.jsonl'}, record 2"
    assert [sample.images for sample in samples(opened(tmp_path, "reconstruct"))] == [(sample.target,) for sample in found]


def test_names_start_from_the_folder_that_is_given(tmp_path):
    write(tmp_path / "pictures", a_png="")
    file = write_json(tmp_path / "texts" / "a.jsonl", [{"image": str(tmp_path / "pictures" / "a.png"), "text": "x"}])
    assert opened(file, images=str(tmp_path / "pictures")).sample(0).target == tmp_path / "pictures" / "a.png"
    with pytest.raises(DataError, match="nowhere: there is no such folder, from which the names in .*a.jsonl start"):
        opened(file, images=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("record, reason", [
    ({"file_name": "b.png", "text": "b"}, "there is no file .*b.png"), ({"file_name": "a.png"}, "its caption is None, not a text"),
    ({"file_name": "a\0.png", "text": "b"}, "there is no file"), ({"file_name": 3, "text": "b"}, "the name of the picture is 3"),
    ({"text": "b"}, "the name of the picture is None"), ({"file_name": "c.png", "text": " "}, "its caption is ' ', not"),
])  # fmt: skip
def test_a_record_that_can_not_be_used_is_a_broken_sample(tmp_path, record, reason):
    write(tmp_path, a_png="", c_png="")
    write_json(tmp_path / "metadata.jsonl", [{"file_name": "sub/../a.png", "text": "a"}, record])
    dataset = opened(tmp_path, "text_to_image")
    assert dataset.sample(0).target == tmp_path / "a.png"
    with pytest.raises(BrokenSample, match=f"metadata.jsonl, record 2: {reason}"):
        dataset.sample(1)


def test_a_line_that_is_no_json_is_a_broken_sample(tmp_path):
    write(tmp_path, a_png="", metadata_jsonl='{"file_name": "a.png", "text": "a"}\n\n{"file_name\n[1]\n')
    found = samples(opened(tmp_path))
    places = [str(item).split(", ", 1)[1] for item in found[1:]]
    assert places[0].startswith("record 2: line 3 is no valid JSON (")
    assert places[1:] == ["record 3: line 4 is a list, not an object {...}"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..", "."])
def test_names_outside_of_the_folder_are_refused_at_once_or_when_drawn(tmp_path, name, monkeypatch):
    write_json(tmp_path / "d" / "metadata.jsonl", [{"file_name": "a.png", "text": "a"}, {"file_name": name, "text": "b"}])
    with pytest.raises(DataError, match=f"record 2: '{name}' lies outside of .*d. Names start from there; data.images gives"):
        opened(tmp_path / "d")
    monkeypatch.setattr("blip3o_core.data.jsonl.CHECKED_RECORDS", 1)
    with pytest.raises(DataError, match=f"record 2: '{name}' lies outside"):
        opened(tmp_path / "d").sample(1)


def test_a_picture_that_is_named_twice_is_refused(tmp_path):
    write_json(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "a"} for name in ("a.png", "b.png", "a.png")])
    with pytest.raises(DataError, match="'a.png' is named in record 1 and again in record 3"):
        opened(tmp_path)


@pytest.mark.parametrize("record, message", [
    ({"file": "a.png", "text": "a"}, "the first record has the fields file, text, none of which names the picture.*file_name, image"),
    ({"file_name": "a.png", "title": "a"}, "fields file_name, title, none of which names the caption.*needs one of text, caption, prompt"),
    ({}, r"the first record has the fields \(none\)"),
])  # fmt: skip
def test_records_with_unknown_fields_are_refused(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        opened(write_json(tmp_path / "metadata.jsonl", [record]))


def test_text_is_learned_from_prompts_with_responses_and_from_conversations(tmp_path):
    file = write_json(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a"}, {"messages": [{"role": "user", "content": "r"},
                                                                                            {"role": "assistant", "content": "b"}]}])
    assert [sample.turns for sample in samples(opened(file, "text"))] == [
        (("user", "q"), ("assistant", "a")), (("user", "r"), ("assistant", "b"))]  # fmt: skip


# Conversations


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize("record, expected, images", [
    ({"image": "a.png", "conversations": turns("<image>\nWhat?", "A")}, (("user", "What?"), ("assistant", "A")), ["a.png"]),
    ({"image_path": "a.png", "conversations": turns("What?\n<image>", "A")}, (("user", "What?"), ("assistant", "A")), ["a.png"]),
    ({"images": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\nDiff?", "A")}, (("user", "Diff?"), ("assistant", "A")),
     ["a.png", "b.png"]),
    ({"image": "a.png", "conversations": turns("What?", "A")}, (("user", "What?"), ("assistant", "A")), ["a.png"]),
    ({"image": "a.png", "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "q"},
                                     {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]},
     (("system", "Be."), ("user", "q"), ("assistant", "a")), ["a.png"]),
    ({"image": "a.png", "conversations": turns(*"qaqaqaqa")}, (("user", "q"), ("assistant", "a")) * 4, ["a.png"]),
    ({"image": "a.png", "conversations": turns(*"qaqaqaqaqa")}, (("user", "q"), ("assistant", "a")) * 3, ["a.png"]),
    ({"image": "a.png", "conversations": turns(*"qaqaqaqaq")}, (("user", "q"), ("assistant", "a")) * 3, ["a.png"]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_conversations_are_read(tmp_path, record, expected, images, name):
    sample = only(tmp_path, "understand", record, name)
    assert sample.turns == expected
    assert sample.images == tuple(tmp_path / image for image in images)


@pytest.mark.parametrize("record, reason", [
    ({"image": "a.png", "conversations": turns("<image>\n<image>\nWhat?", "A")}, "has 2 <image> for 1 pictures"),
    ({"images": ["a.png", "b.png"], "conversations": turns("<image>\nWhat?", "A")}, "has 1 <image> for 2 pictures"),
    ({"conversations": turns("<image>\nWhat?", "A")}, "has 1 <image> for 0 pictures"),
    ({"conversations": turns("What?", "A")}, "has no picture; the task text"),
    ({"image": "c.png", "conversations": turns("What?", "A")}, "there is no file .*c.png"),
    ({"image": "a.png", "conversations": turns("What?")}, "has no answer to learn from"),
    ({"image": "a.png", "conversations": turns("What?", " ")}, "has an empty answer"),
    ({"image": "a.png", "conversations": []}, "has no list of turns"),
    ({"image": "a.png", "conversations": [{"from": "bot", "value": "x"}]}, "turn 1 has no role"),
    ({"image": "a.png", "conversations": [{"from": "human"}]}, "turn 1 has no role .* or no text"),
    ({"image": "a.png", "conversations": turns("q", "a")[::-1]}, "turn 1 is of the assistant; user and assistant take turns"),
    ({"image": "a.png", "conversations": [*turns("q", "a"), {"from": "system", "value": "s"}]}, "turn 3 is a system turn"),
])  # fmt: skip
def test_conversations_that_can_not_be_used_are_broken_samples(tmp_path, record, reason):
    with pytest.raises(BrokenSample, match=reason):
        only(tmp_path, "understand", record)


def test_what_the_user_says_may_be_drawn(tmp_path):
    sample = only(tmp_path, "text_to_image", {"image": "b.png", "conversations": turns("A cat.", "<image>")})
    assert (sample.text, sample.target, sample.turns, sample.images) == ("A cat.", tmp_path / "b.png", (), ())
    with pytest.raises(BrokenSample, match="has 0 pictures; exactly one is drawn"):
        only(tmp_path, "text_to_image", {"conversations": turns("A cat.", "Yes.")})


def test_the_task_text_refuses_pictures(tmp_path):
    with pytest.raises(BrokenSample, match="has a picture, which the task text has no use for"):
        only(tmp_path, "text", {"image": "a.png", "conversations": turns("q", "a")})


def test_a_file_without_conversations_is_refused(tmp_path):
    with pytest.raises(DataError, match="the first record has the fields image, text. A conversation is in conversations, messages"):
        opened(write_json(tmp_path / "a.json", [{"image": "a.png", "text": "x"}]), "understand", "conversations")


# Edits


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("source", ["a.png", ["a.png", "b.png"]])
def test_edits_are_read(tmp_path, name, source):
    sample = only(tmp_path, "edit", {"source": source, "instruction": " make it red ", "target": "b.png"}, name)
    assert (sample.text, sample.target) == ("make it red", tmp_path / "b.png")
    assert sample.images == tuple(tmp_path / file for file in np.atleast_1d(source))


@pytest.mark.parametrize("change, reason", [
    ({"source": []}, "has no source picture"), ({"source": "c.png"}, "there is no file .*c.png"), ({"target": None}, "picture is None"),
    ({"instruction": ""}, "its instruction is '', not a text"),
])  # fmt: skip
def test_edits_that_can_not_be_used_are_broken_samples(tmp_path, change, reason):
    with pytest.raises(BrokenSample, match=f"data.json, record 2: .*{reason}"):
        only(tmp_path, "edit", {"source": "a.png", "instruction": "x", "target": "b.png"} | change)


def test_edits_lead_to_nothing_outside_of_their_folder(tmp_path):
    with pytest.raises(DataError, match="'../a.png' lies outside"):
        only(tmp_path, "edit", {"source": "../a.png", "instruction": "x", "target": "b.png"})


def test_edits_without_a_field_are_refused(tmp_path):
    with pytest.raises(DataError, match="the first record has the fields instruction, input. An edit also needs source, target"):
        opened(write_json(tmp_path / "a.json", [{"instruction": "x", "input": "a.png"}]), "edit")


# Formats and tasks


@pytest.mark.parametrize("format, task", [(format, task) for format, tasks in FITTING_TASKS.items()
                                          for task in FITTING_TASKS["webdataset"] if task not in tasks])  # fmt: skip
def test_a_format_that_holds_nothing_for_the_task_is_refused(tmp_path, format, task):
    with pytest.raises(DataError, match=f"the format {format} holds nothing for the task {task}, but for .*{task} is learned from "):
        opened(tmp_path, task, format)


@pytest.mark.parametrize("path", ["nowhere", "nowhere.json", "nowhere.tar", "*.tar"])
@pytest.mark.parametrize("format", ["auto", "folder", "jsonl", "webdataset"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path, path, format):
    with pytest.raises(DataError, match="there is no such file or folder. Check the path"):
        opened(tmp_path / path, format=format)


@pytest.mark.parametrize("format, task, message", [
    ("auto", "text_to_image", "neither a folder nor a .json, .jsonl or .tar"), ("folder", "text_to_image", "a file, not a folder"),
    ("zip", "text_to_image", "the format 'zip' is unknown. Use auto or"), ("auto", "paint", "the task 'paint' is unknown. Use one of"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path, format, task, message):
    write(tmp_path, a_md="text")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.md", task, format)


def test_a_folder_is_no_jsonl_without_its_metadata(tmp_path):
    with pytest.raises(DataError, match="a folder without metadata.jsonl. Give the file"):
        opened(tmp_path, format="jsonl")


def test_a_json_of_unknown_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="the first record has the fields url, alt, which neither name an instruction"):
        opened(write_json(tmp_path / "a.json", [{"url": "x", "alt": "y"}]))


# Augmentation


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_augmentation_is_a_function_of_its_generator_and_says_what_it_did():
    image = Image.fromarray(random(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    seen: dict[str, bytes] = {}
    for seed in range(100):
        result, done = augment(image, random(seed), 0.5, "random")
        assert result.size == (20, 20)
        assert seen.setdefault(done, result.tobytes()) == result.tobytes()
        assert augment(image, random(seed), 0.5, "random")[0].tobytes() == result.tobytes()
    assert len(set(seen.values())) == len(seen) > 30
    left = {int(done.split("-")[1].split(".")[0]) for done in seen}
    assert min(left) <= 1 and max(left) >= 29


def test_a_flip_mirrors_left_to_right_with_its_probability():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    found = [augment(image, random(seed), 0.25, "centre") for seed in range(2000)]
    assert 0.22 < sum(done == "flip1-centre" for _, done in found) / 2000 < 0.28
    for result, done in found[:50]:
        expected = np.asarray(image)[:, ::-1] if done == "flip1-centre" else np.asarray(image)
        assert np.array_equal(np.asarray(result), expected)


@pytest.mark.parametrize("crop, size", [("centre", (5, 9)), ("random", (5, 5))])
def test_pictures_that_need_no_crop_are_left_whole(crop, size):
    assert augment(Image.new("RGB", size), random(0), 0, crop)[1] == "flip0-centre"
