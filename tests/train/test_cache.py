"""Caches change the speed and the memory of a run, and nothing else."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from blip3o_core.data.cache import FeatureCache
from blip3o_core.models.eva_clip import EvaClip
from blip3o_core.models.qwen2_5_vl import Backbone, VisionTower
from blip3o_core.train import run as running
from blip3o_core.train.run import run_training
from blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_core.variants.eva_clip import EvaClipCheckpoint

UNIFIED = ("text_to_image", "reconstruct", "edit")


@pytest.fixture
def cached(train_config, tmp_path):
    """cached(material, "run", ...): the configuration of a run of all drawing tasks that fills or reads the cache."""

    def make(data, name: str = "run", *, enabled: bool = True, train=None, validation=None, **sections):
        if not isinstance(data, list):
            data = [each for each in data.five_tasks if each.get("task", UNIFIED[0]) in UNIFIED]
        return train_config(data, train={"steps": 4, "batch_size": 3, **(train or {})},
                            cache={"enabled": enabled, "folder": str(tmp_path / "cache")},
                            validation=validation or {"every": 4, "samples": 2, "timesteps": 2},
                            output={"folder": str(tmp_path / name), "log_every": 1}, **sections)  # fmt: skip

    return make


@pytest.fixture
def entries(tmp_path):
    """entries("eva"): files of that kind, with their time."""
    return lambda kind: {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob(f"{kind}-*/*/*.safetensors")}


@pytest.fixture
def passes(monkeypatch):
    """How often each frozen network has run, in samples."""
    counts = {"EvaClip": 0, "Backbone": 0, "VisionTower": 0}
    for cls in (EvaClip, Backbone, VisionTower):
        original = cls.forward

        def forward(self, first, *args, _original=original, _name=cls.__name__, **kwargs):
            counts[_name] += len(first)
            return _original(self, first, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return counts


def losses(logged, folder: Path) -> list:
    return [(line["step"], line["losses"]) for kind in ("train", "validation") for line in logged(folder, kind)]


def test_losses_are_the_same_bits_with_and_without(material, cached, logged, tmp_path):
    data = [
        {"path": str(material.folder), "flip": 0.5, "caption_dropout": 0.3, "trigger": "toy"},
        {"path": str(material.edits), "task": "edit"}, {"path": str(material.folder), "task": "reconstruct"},
    ]  # fmt: skip
    for name, enabled in (("plain", False), ("filling", True), ("reading", True)):
        assert run_training(cached(data, name, enabled=enabled)) == 0
    plain = losses(logged, tmp_path / "plain")
    assert len(plain) == 6
    assert losses(logged, tmp_path / "filling") == plain
    assert losses(logged, tmp_path / "reading") == plain


@pytest.fixture
def validation_of_its_own(tmp_path, material):
    folder = Path(shutil.copytree(material.folder, tmp_path / "validation"))
    for file in sorted(folder.glob("*.txt")):
        file.write_text(f"another {file.read_text()}")
        picture = file.with_suffix(".png")
        picture.write_bytes(picture.read_bytes() + b"another")
    return folder


def test_only_the_diffusion_transformer_is_loaded_once_the_cache_is_full(
    material, validation_of_its_own, cached, passes, monkeypatch, tmp_path
):  # fmt: skip
    validation = {"every": 2, "samples": 2, "timesteps": 2, "data": [{"path": str(validation_of_its_own)}]}
    data = [{"path": str(material.folder), "flip": 1.0, "caption_dropout": 0.5}, {"path": str(material.edits), "task": "edit"}]

    def config(name: str):
        return cached(data, name, validation=validation)

    seen = []
    training = running.train
    monkeypatch.setattr(running, "train", lambda run, *rest: seen.append(dict(passes)) or training(run, *rest))
    assert run_training(config("filling")) == 0
    assert seen == [passes], "a frozen network ran while training"
    assert passes["EvaClip"] and passes["Backbone"] and passes["VisionTower"]

    def refuse(*args, **kwargs):
        raise AssertionError("was loaded")

    for cls, name in ((Blip3oCheckpoint, "load_backbone"), (Blip3oCheckpoint, "load_vision_tower"), (EvaClipCheckpoint, "load")):
        monkeypatch.setattr(cls, name, refuse)
    passes.update(dict.fromkeys(passes, 0))
    frozen, networks = [], []
    made, built = running.FrozenNetworks, running.build_model
    monkeypatch.setattr(running, "FrozenNetworks", lambda *a, **k: frozen.append(made(*a, **k)) or frozen[-1])
    monkeypatch.setattr(running, "build_model", lambda *a, **k: networks.append(built(*a, **k)) or networks[-1])
    assert run_training(config("reading")) == 0
    assert frozen[0].loaded == () and [name for name, _ in networks[0].named_children()] == ["dit"]
    assert set(passes.values()) == {0}


def test_an_interrupted_fill_goes_on_where_it_was(material, cached, passes, entries, monkeypatch):
    data = [{"path": str(material.folder)}]
    stored, original = [], FeatureCache.store

    def store(self, key, tensor):
        if len(stored) == 5:
            raise KeyboardInterrupt
        stored.append(key)
        original(self, key, tensor)

    monkeypatch.setattr(FeatureCache, "store", store)
    with pytest.raises(KeyboardInterrupt):
        run_training(cached(data))
    before = entries("eva")
    assert len(before) == 5 and not entries("states")
    monkeypatch.setattr(FeatureCache, "store", original)
    passes.update(dict.fromkeys(passes, 0))
    assert run_training(cached(data)) == 0
    after = entries("eva")
    assert len(after) == 8 and len(entries("states")) == 8
    assert {file: after[file] for file in before} == before, "entries were written twice"
    assert passes["EvaClip"] == 3 and passes["Backbone"] == 8


def test_pictures_are_known_by_content_not_by_name(own_material, cached, passes, entries):
    run_training(cached([{"path": str(own_material.folder)}], "first"))
    assert (passes["EvaClip"], len(entries("eva")), len(entries("states"))) == (8, 8, 8)
    own_material.folder.rename(own_material.root / "elsewhere")
    pictures = sorted((own_material.root / "elsewhere").glob("*.png"))
    for suffix in (".png", ".txt"):  # renamed with its caption
        pictures[0].with_suffix(suffix).rename(pictures[0].with_name(f"zzz{suffix}"))
    moved = [{"path": str(own_material.root / "elsewhere")}]
    run_training(cached(moved, "second"))
    assert (passes["EvaClip"], len(entries("eva"))) == (8, 8)
    pictures[1].write_bytes(pictures[2].read_bytes() + b"changed")
    pictures[3].with_suffix(".txt").write_text("another caption")
    run_training(cached(moved, "third"))
    assert (passes["EvaClip"], passes["Backbone"]) == (9, 9)
    assert (len(entries("eva")), len(entries("states"))) == (9, 9)


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: bytes(len(raw)),
], ids=["empty", "cut", "zeros"])  # fmt: skip
def test_damaged_entries_are_computed_anew(damage, material, cached, passes, entries, logged, tmp_path):
    data = [{"path": str(material.folder)}]
    run_training(cached(data, "first"))
    chance = random.Random(0)
    for kind in ("eva", "states"):
        file = chance.choice(sorted(entries(kind)))
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        passes.update(dict.fromkeys(passes, 0))
        run_training(cached(data, f"after {kind}"))
        assert file.read_bytes() == whole
        assert passes == {"EvaClip": int(kind == "eva"), "Backbone": int(kind == "states"), "VisionTower": 0}
        assert losses(logged, tmp_path / f"after {kind}") == losses(logged, tmp_path / "first")


def test_two_processes_may_fill_one_cache(material, cached, start, entries, logged, tmp_path):
    jobs = [start(cached(material, name))[0] for name in ("one", "two")]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].err + jobs[1].err
    assert len(entries("eva")) == 8
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert losses(logged, tmp_path / "one") == losses(logged, tmp_path / "two")


def test_the_processes_of_one_run_share_the_work(material, cached, finish, passes, entries, logged, tmp_path):
    finish(cached(material, "two", train={"batch_size": 1}), processes=2)
    count = len(entries("eva")), len(entries("states"))
    assert run_training(cached(material, "one", train={"batch_size": 2})) == 0
    assert passes == {"EvaClip": 0, "Backbone": 0, "VisionTower": 0}, "something was missing"
    assert (len(entries("eva")), len(entries("states"))) == count
    for one, two in zip(losses(logged, tmp_path / "one"), losses(logged, tmp_path / "two"), strict=True):
        assert one[1] == pytest.approx(two[1], rel=1e-4)


def test_a_broken_picture_is_passed_over_when_filling(broken_material, cached, entries, tmp_path):
    assert run_training(cached([{"path": str(broken_material.folder)}], train={"steps": 8})) == 0
    assert len(entries("eva")) == 8
    broken = [json.loads(line)["name"] for line in (tmp_path / "run" / "broken.jsonl").read_text().splitlines()]
    assert [Path(name).name for name in broken] == ["broken.png"]


def test_entries_of_another_precision_or_model_are_not_read(material, cached, passes, entries, edit_tensors, checkpoint_copy):
    data = [{"path": str(material.folder)}]
    run_training(cached(data, "first"))
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: change_one(tensors, "embed_tokens"))
    run_training(cached(data, "another", model={"path": str(checkpoint_copy)}))
    assert passes["EvaClip"] == 8 and passes["Backbone"] == 16
    run_training(cached(data, "bf16", train={"precision": "bf16"}))
    assert passes["EvaClip"] == 16 and passes["Backbone"] == 24
    assert len({file.parents[1] for file in entries("*")}) == 5


def change_one(tensors: dict[str, torch.Tensor], word: str) -> None:
    name = next(name for name in tensors if word in name)
    tensors[name] = tensors[name] + 0.01
