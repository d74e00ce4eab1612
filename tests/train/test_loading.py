"""Batches: the same samples whoever reads them, from any position, with broken ones inside; no hang when a worker dies."""

import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_core.data.broken import BrokenSample
from blip3o_core.data.loading import TrainingData, batches
from blip3o_core.data.mixture import Mixture
from blip3o_core.data.open import open_dataset
from blip3o_core.data.sample import Sample
from blip3o_core.errors import DataError, InputError

REPOSITORY = Path(__file__).parents[2]


class Numbers:
    """An indexed dataset of numbers, some of which can't be read."""

    task = "text_to_image"

    def __init__(self, name: str, length: int, missing: tuple[int, ...] = ()) -> None:
        self.name = name
        self.length = length
        self.missing = missing

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> Sample:
        if index in self.missing:
            raise BrokenSample(f"{self.name}{index}", "missing")
        return Sample(f"{self.name}{index}", self.task, text=f"{self.name}{index}")


def text_of(sample: Sample, position: int) -> str:
    """What `prepare` is in these tests; a sample called "bad" can't be used."""
    if "bad" in sample.text:
        raise InputError(f"{sample.text}: damaged")
    return sample.text


def pid_of(sample: Sample, position: int) -> tuple[str, int]:
    return sample.text, os.getpid()


def slow_tensor_of(sample: Sample, position: int) -> torch.Tensor:
    time.sleep(0.05)
    return torch.zeros(1000)


def wrong(sample: Sample, position: int) -> str:
    raise KeyError("a mistake in prepare")


def picture(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), shade).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def loader(datasets: list, *, batch_size: int = 2, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0, prepare=text_of,
           weights=None, known_broken=frozenset()) -> TrainingData:  # fmt: skip
    lengths = [getattr(dataset, "count", None) or len(dataset) for dataset in datasets]
    mixture = Mixture(lengths, weights or [0] * len(datasets), [1] * len(datasets), seed)
    return TrainingData(datasets, mixture, prepare, batch_size=batch_size, rank=rank, world=world, workers=workers,
                        known_broken=known_broken)  # fmt: skip


def taken(data: TrainingData, count: int, start: int = 0, **options) -> list:
    stream = batches(data, start, **options)
    items = [item for _ in range(count) for item in next(stream)]
    stream.close()
    return items


def examples(items: list) -> list:
    return [item.example for item in items]


def tars(folder: Path, sizes: list[int], *, bad: tuple[int, ...] = (), lone: tuple[int, ...] = (), shuffle_buffer: int = 3):
    """Shards whose `bad` samples are refused by text_of and whose `lone` ones lack their picture."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for number in range(number, number + size):  # noqa: B020
            members += [] if number in lone else [(f"{number}.png", picture(number % 256))]
            members += [(f"{number}.txt", f"{folder.name}{number}{'bad' * (number in bad)}".encode())]
        number += 1
        write_tar(folder / f"{shard}.tar", members)
    return open_dataset(str(folder / "*.tar"), format="auto", task="text_to_image", shuffle_buffer=shuffle_buffer)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_of_indexed_datasets_shows_every_sample_once(world, workers):
    datasets = [Numbers("a", 17), Numbers("b", 7)]
    counted = Counter()
    for rank in range(world):
        counted.update(examples(taken(loader(datasets, rank=rank, world=world, workers=workers), 12 // world)))
    assert counted == {f"a{n}": 1 for n in range(17)} | {f"b{n}": 1 for n in range(7)}


@pytest.mark.parametrize("sizes", [[4] * 6, [24], [12, 12]])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_of_tars_shows_every_sample_once_with_fewer_shards_than_readers_too(tmp_path, world, workers, sizes):
    dataset = tars(tmp_path / "t", sizes)
    for epoch in range(2):
        counted = Counter()
        for rank in range(world):
            counted.update(examples(taken(loader([dataset], rank=rank, world=world, workers=workers), 12 // world, epoch * 24)))
        assert counted == {f"t{n}": 1 for n in range(24)}


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_with_half_the_batch_see_the_samples_of_one(workers):
    datasets = [Numbers("a", 17, missing=(3, 5)), Numbers("b", 7)]
    whole = examples(taken(loader(datasets, batch_size=4, workers=workers), 10))
    halves = [examples(taken(loader(datasets, batch_size=2, rank=rank, world=2, workers=workers), 10)) for rank in range(2)]
    assert whole == [text for first in range(0, 20, 2) for half in halves for text in half[first : first + 2]]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [2, 10, 24, 38])
def test_resume_equals_the_unbroken_run_of_indexed_datasets_with_broken_samples(workers, start):
    datasets = [Numbers("a", 17, missing=(0, 3, 5, 8)), Numbers("b", 7, missing=(1,))]
    unbroken = taken(loader(datasets), 30)
    assert sum(len(item.broken) for item in unbroken) > 5
    assert taken(loader(datasets, workers=workers), 30 - start // 2, start) == unbroken[start:]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world, rank", [(1, 0), (2, 1)])
@pytest.mark.parametrize("start", [4, 20, 44, 92])
def test_resume_equals_the_unbroken_run_of_tars_with_broken_samples(tmp_path, workers, world, rank, start):
    datasets = [tars(tmp_path / "s", [5, 8, 3], bad=(2, 6, 14), lone=(1,)), Numbers("a", 9, missing=(4,)),
                tars(tmp_path / "t", [11], bad=(0,))]  # fmt: skip
    options = dict(world=world, rank=rank, workers=workers, weights=[2, 1, 1])
    unbroken = taken(loader(datasets, **options), 60 // world)
    first = start // world
    known = frozenset(name for item in unbroken[:first] for name, _ in item.broken)
    assert any("png+txt" in name for name in known) or start < 44  # else there is nothing to know
    resumed = taken(loader(datasets, **options, known_broken=known), (120 - start) // world // 2, start)
    assert examples(resumed) == examples(unbroken[first:])
    assert [item.position for item in resumed] == [item.position for item in unbroken[first:]]


def test_skipping_to_a_position_decodes_nothing(tmp_path):
    seen = []
    taken(loader([tars(tmp_path / "t", [24])], prepare=lambda sample, position: seen.append(position)), 1, 20)
    assert seen == [20, 21]


def test_positions_may_be_asked_for_in_any_order(tmp_path):
    datasets = [tars(tmp_path / "t", [5, 8], bad=(3,)), Numbers("a", 9)]
    forward = examples(taken(loader(datasets, workers=0), 30))
    data = loader(datasets, known_broken=frozenset({f"{tmp_path / 't' / '0.tar'}: 3.png+txt"}))
    order = random.Random(0).sample(range(60), 60)
    assert {position: data[position].example for position in order} == dict(enumerate(forward))


def test_a_position_asked_for_again_gives_the_same_with_broken_samples_before_it(tmp_path):
    data = loader([tars(tmp_path / "t", [5, 8], bad=(3, 4, 7))])
    forward = [data[position].example for position in range(40)]
    assert [data[position].example for position in (30, 5, 39)] == [forward[position] for position in (30, 5, 39)]


def test_datasets_may_have_a_prepare_each(tmp_path):
    datasets = [Numbers("a", 6), tars(tmp_path / "t", [6])]
    items = taken(loader(datasets, prepare=[lambda sample, position: ("first", sample.text[0]),
                                            lambda sample, position: ("second", sample.text[0])]), 6)  # fmt: skip
    assert Counter(examples(items)) == {("first", "a"): 6, ("second", "t"): 6}


def test_draws_before_a_position_are_counted_as_they_were_drawn(monkeypatch):
    monkeypatch.setattr("blip3o_core.data.loading._COUNTED_POSITIONS", 7)
    data = loader([Numbers("a", 17), Numbers("b", 7)], batch_size=3, rank=1, world=2, workers=2)
    walked = {lane: np.zeros(2, np.int64) for lane in (2, 3)}
    for micro_batch in data.positions(0):
        for position in micro_batch:
            lane = data._lane_number(position)
            assert data._drawn_before(position).tolist() == walked[lane].tolist()
            walked[lane][data.mixture.locate(position).dataset] += 1
        if position > 100:
            break


def test_workers_read_one_lane_each_from_any_start(tmp_path):
    dataset = tars(tmp_path / "t", [30, 30])
    for start in (0, 2, 4, 6):
        data = loader([dataset], workers=3, prepare=pid_of)
        readers: dict[int, set[int]] = {}
        for item in taken(data, 9, start):
            readers.setdefault(data._lane_number(item.position), set()).add(item.example[1])
        assert len(readers) == 3 and all(len(pids) == 1 for pids in readers.values())
        assert os.getpid() not in set.union(*readers.values())


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_workers_may_be_started_afresh(tmp_path, start_method):
    """In a process of its own, whose modules the workers can import by their names."""
    (tmp_path / "f").mkdir()
    for number in range(6):
        (tmp_path / "f" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "m.jsonl").write_text("".join(f'{{"file_name": "f/{number}.png"}}\n' for number in range(6)))
    tars(tmp_path / "t", [6])
    result = _run_here(f"""
        paths = {[str(tmp_path / name) for name in ("f", "m.jsonl", "t/*.tar")]!r}
        datasets = [t.open_dataset(path, format="auto", task="reconstruct") for path in paths]
        here, there = (t.taken(t.loader(datasets, workers=workers, prepare=t.name_of), 18, **options)
                       for workers, options in ((0, {{}}), (1, dict(start_method={start_method!r}))))
        print(here == there, len(set(t.examples(here))))""")
    assert result.communicate()[0] == "True 18\n"


def name_of(sample: Sample, position: int) -> str:
    return sample.name


def _run_here(code: str) -> subprocess.Popen:
    """Another Python with this file as `t`."""
    places = [str(REPOSITORY), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {places!r}; import test_loading as t\n{textwrap.dedent(code)}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_started_loader_can_be_pickled(tmp_path):
    data = loader([tars(tmp_path / "t", [6]), Numbers("a", 6)])
    expected = examples(taken(data, 6))
    assert examples(taken(pickle.loads(pickle.dumps(data)), 6)) == expected


def test_global_random_state_is_neither_used_nor_changed(tmp_path):
    datasets = [tars(tmp_path / "t", [6]), Numbers("a", 6)]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        results.append(taken(loader(datasets, workers=2), 6))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert results[0] == results[1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("prepare", [pid_of, slow_tensor_of])
def test_a_killed_worker_is_an_error_with_advice_and_no_hang(prepare):
    stream = batches(loader([Numbers("a", 100)], workers=2, prepare=prepare))
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a data worker was killed, usually out of memory: lower loader.workers, which is 2"):
        for _ in range(1000):
            next(stream)


@pytest.mark.timeout(60)
def test_workers_end_with_a_killed_parent():
    parent = _run_here("""
        import time, multiprocessing
        stream = t.batches(t.loader([t.Numbers('a', 100)], workers=2, prepare=t.pid_of))
        next(stream)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(100)""")
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(_runs, workers))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(_runs, workers))


def test_closing_the_stream_ends_its_workers():
    stream = batches(loader([Numbers("a", 100)], workers=2, prepare=pid_of))
    workers = {item.example[1] for _ in range(4) for item in next(stream)}
    assert len(workers) == 2 and all(map(_runs, workers))
    stream.close()
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_usable_samples_is_an_error(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("blip3o_core.data.loading.MAX_SKIPPED", 50)
    with pytest.raises(DataError, match="^a: 20 samples in a row can't be used. The last is a[0-4]: missing"):
        taken(loader([Numbers("a", 5, missing=(0, 1, 2, 3, 4))], workers=workers), 1)
    with pytest.raises(DataError, match="^.*: reader 1 of 1 found no usable sample in a whole pass over 4. Check the tars"):
        taken(loader([tars(tmp_path / "s", [4], lone=(0, 1, 2, 3))], workers=workers), 1)
    with pytest.raises(DataError, match="50 samples in a row can't be used. The last is .*s[0-3]bad: damaged"):
        taken(loader([tars(tmp_path / "s", [4], bad=(0, 1, 2, 3))], workers=workers), 1)


def test_more_readers_than_samples_are_an_error_with_advice(tmp_path):
    with pytest.raises(DataError, match=r"reader [34] of 4 found no usable sample in a whole pass over 2.*lower loader.workers"):
        taken(loader([tars(tmp_path / "t", [2])], workers=4), 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_prepare_is_no_broken_sample(workers):
    with pytest.raises(KeyError, match="a mistake in prepare"):
        taken(loader([Numbers("a", 5)], workers=workers, prepare=wrong), 1)


def test_broken_samples_are_named_with_their_reason(tmp_path):
    items = taken(loader([tars(tmp_path / "t", [6], bad=(2,), lone=(4,))]), 2)
    tar = tmp_path / "t" / "0.tar"
    assert dict(pair for item in items for pair in item.broken) == {
        f"{tar}: 2.png+txt": "t2bad: damaged", f"{tar}: 4.txt": "has no pictures called .(jpg|jpeg|png|webp)"}  # fmt: skip
