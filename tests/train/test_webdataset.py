"""Tars: every sample once per pass whoever reads, damage stays within its shard, nothing but local files."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from blip3o_core.data.broken import BrokenSample
from blip3o_core.data.open import open_dataset
from blip3o_core.data.webdataset import count_samples
from blip3o_core.errors import DataError

pytest.importorskip("webdataset", reason="the extra train is not installed")


def picture(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), shade).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes | str | dict]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            content = json.dumps(content) if isinstance(content, dict) else content
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_shards(folder: Path, sizes: list[int]) -> str:
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            members += [(f"{number:04}.png", picture(number)), (f"{number:04}.txt", f"caption {number}")]
            number += 1
        write_tar(folder / f"{shard:03}.tar", members)
    return str(folder / "*.tar")


def opened(path, task: str = "text_to_image", **options):
    return open_dataset(str(path), format="auto", task=task, **options)


def one_pass(dataset, number: int = 0, lanes: int = 1) -> list[list]:
    return [list(dataset.stream(number, lane, lanes)) for lane in range(lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shuffle_buffer", [1, 4, 1000])
def test_a_pass_gives_every_sample_once_over_all_lanes(tmp_path, lanes, shuffle_buffer):
    dataset = opened(write_shards(tmp_path, [5, 1, 7]), shuffle_buffer=shuffle_buffer)
    assert dataset.count == 13
    for number in range(3):
        texts = [sample.text for lane in one_pass(dataset, number, lanes) for sample in lane]
        assert sorted(texts) == sorted(f"caption {number}" for number in range(13))


@pytest.mark.parametrize("lanes", [2, 3, 4, 5])
def test_equal_shards_give_all_lanes_the_same_number_to_within_one(tmp_path, lanes):
    lengths = [len(lane) for lane in one_pass(opened(write_shards(tmp_path, [7] * 7)), 0, lanes)]
    assert max(lengths) - min(lengths) <= 1 and sum(lengths) == 49


def test_order_depends_on_seed_and_pass_only(tmp_path):
    path = write_shards(tmp_path, [9, 9])
    order = {(seed, number): tuple(sample.text for sample in one_pass(opened(path, seed=seed), number)[0])
             for seed in (0, 1) for number in (0, 1)}  # fmt: skip
    assert len(set(order.values())) == 4
    assert tuple(sample.text for sample in one_pass(opened(path, seed=1), 1)[0]) == order[1, 1]


def test_samples_carry_the_bytes_that_the_tar_holds(tmp_path):
    sample = one_pass(opened(write_tar(tmp_path / "a.tar", [("x.png", picture(9)), ("x.txt", "\ufeffa cat\n")])))[0][0]
    assert (sample.text, sample.target, sample.images) == ("a cat", picture(9), ())
    assert sample.name == f"{tmp_path / 'a.tar'}: x.png+txt"


def test_a_tar_cut_in_the_middle_gives_what_is_whole_and_the_pass_goes_on(tmp_path):
    path = write_shards(tmp_path, [4, 4])
    first = tmp_path / "000.tar"
    with tarfile.open(first) as tar:
        cut = tar.getmember("0002.png").offset_data + 20
    first.write_bytes(first.read_bytes()[:cut])
    dataset = opened(path)
    items = one_pass(dataset)[0]
    assert sorted(item.text for item in items if not isinstance(item, BrokenSample)) == [f"caption {n}" for n in (0, 1, 4, 5, 6, 7)]
    broken = [item for item in items if isinstance(item, BrokenSample)]
    assert [(item.name, item.reason) for item in broken] == [(str(first), "the tar is damaged or cut off (unexpected end of data)")]
    assert dataset.count == 7  # 0002's header is there


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    first = write_tar(tmp_path / "a.tar", [("x.png", picture()), ("x.txt", "x"), ("y.png", picture()), ("y.txt", "y")])
    with tarfile.open(first) as tar:
        cut = tar.getmember("y.png").offset
    first.write_bytes(first.read_bytes()[:cut])
    items = one_pass(opened(first))[0]
    assert sorted(str(getattr(item, "reason", "good")) for item in items) == ["good", "the tar ends without its end mark: it is cut off"]


def test_bytes_that_are_no_tar_break_only_their_shard(tmp_path):
    path = write_shards(tmp_path, [2, 2])
    (tmp_path / "000.tar").write_bytes(b"<html>" * 1000)
    items = one_pass(opened(path))[0]
    assert Counter(type(item).__name__ for item in items) == {"Sample": 2, "BrokenSample": 1}
    assert count_samples(str(tmp_path / "000.tar")) == 0


@pytest.mark.parametrize("task, members, reason", [
    ("text_to_image", [("x.txt", "a")], "has no pictures called"),
    ("text_to_image", [("x.png", picture())], "has neither .txt nor .json"),
    ("text_to_image", [("x.png", picture()), ("x.jpg", picture()), ("x.txt", "a")], "has 2 pictures"),
    ("text_to_image", [("x.png", picture()), ("x.txt", " \n")], "its text .* is ' "),
    ("text_to_image", [("x.png", picture()), ("x.txt", b"\xff\xfe")], "its .txt is not UTF-8"),
    ("text_to_image", [("x.png", picture()), ("x.json", "{")], "its .json is no valid JSON"),
    ("text_to_image", [("x.png", picture()), ("x.json", "[1]")], "its .json is a list"),
    ("edit", [("x.source.png", picture()), ("x.json", {"instruction": "a"})], r"has no pictures called .target.\(jpg"),
    ("edit", [("x.target.png", picture()), ("x.json", {"instruction": "a"})], r"has no pictures called .source.\(jpg"),
    ("text", [("x.json", {"text": "a"})], "has no list of turns"),
    ("understand", [("x.json", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})], "has no picture"),
])  # fmt: skip
def test_what_is_missing_is_named(tmp_path, task, members, reason):
    dataset = opened(write_tar(tmp_path / "a.tar", [*members, ("y.unknown", "")]), task)
    item = next(item for item in one_pass(dataset)[0] if not item.name.endswith("unknown"))
    with pytest.raises(BrokenSample, match=reason):
        raise item


def test_all_kinds_of_members_are_read(tmp_path):
    turns = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    red = {"instruction": "red"}
    edit = write_tar(tmp_path / "edit.tar", [("x.source.jpg", picture(1)), ("x.target.png", picture(2)), ("x.json", red)])
    talk = write_tar(tmp_path / "talk.tar", [("x.jpg", picture(3)), ("x.json", turns)])
    caption = write_tar(tmp_path / "caption.tar", [("x.webp", picture(4)), ("x.json", {"caption": "a dog"})])
    sample = one_pass(opened(edit, "edit"))[0][0]
    assert (sample.text, sample.images, sample.target) == ("red", (picture(1),), picture(2))
    sample = one_pass(opened(talk, "understand"))[0][0]
    assert (sample.turns, sample.images) == ((("user", "What?"), ("assistant", "A cat.")), (picture(3),))
    assert one_pass(opened(caption))[0][0].text == "a dog"
    sample = one_pass(opened(caption, "reconstruct"))[0][0]
    assert (sample.text, sample.images, sample.target) == ("", (picture(4),), picture(4))


def test_a_name_twice_in_a_tar_is_reported_and_the_rest_is_read(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("x.png", picture()), ("x.png", picture()), ("x.txt", "x"), ("y.png", picture()), ("y.txt", "y")])
    items = one_pass(opened(tar))[0]
    assert sorted(item.text for item in items if not isinstance(item, BrokenSample)) == ["x", "y"]
    assert ["duplicate file name" in item.reason for item in items if isinstance(item, BrokenSample)] == [True]


@pytest.mark.parametrize("path", ["pipe:touch {}/ran", "https://example.com/a.tar", "s3://bucket/a.tar", "file:{}/a.tar"])
@pytest.mark.parametrize("format", ["auto", "webdataset"])
def test_addresses_and_commands_are_refused(tmp_path, path, format):
    with pytest.raises(DataError, match="only local tars are read, no addresses and no pipe: commands"):
        open_dataset(path.format(tmp_path), format=format, task="text_to_image")
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_is_a_command_is_only_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("pipe:touch ran.tar"), [("x.png", picture()), ("x.txt", "x")])
    dataset = opened("*.tar")
    assert [item.text for item in one_pass(dataset)[0]] == ["x"]
    assert not Path("ran.tar").exists()


def test_braces_and_folders_name_several_tars(tmp_path):
    write_shards(tmp_path, [2, 3, 4])
    assert opened(tmp_path / "{000..001}.tar").count == 5
    assert open_dataset(str(tmp_path), format="webdataset", task="text_to_image").count == 9
    with pytest.raises(DataError, match=r"003.tar: there is no such file"):
        opened(tmp_path / "{000..003}.tar")
    with pytest.raises(DataError, match="its braces don't match"):
        opened(tmp_path / "{000..003.tar")


def test_a_given_count_is_believed(tmp_path):
    assert opened(write_shards(tmp_path, [3]), samples=70).count == 70


def test_tars_without_samples_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="no samples in 1 tars. Members are called KEY.jpg"):
        opened(tmp_path / "a.tar")
