"""blip3o evaluate: right answers and pictures score 1, wrong ones 0, and prompt files give what public scorers read."""

import json
import socket
import subprocess

import numpy as np
import pytest
from PIL import Image

from blip3o_core.evaluate import scores, shapes
from blip3o_core.evaluate.items import DrawItem, Drawn
from blip3o_core.shapes import edits, prompts, questions
from blip3o_core.shapes.facts import realise
from blip3o_core.shapes.holdout import held_out_facts, is_held_out
from blip3o_core.shapes.judge import Verdict
from blip3o_core.shapes.world import render

from ..conftest import command, command_environment

PER_CATEGORY = 4
QUICK = ("--width", 64, "--height", 64, "--steps", 2, "--decoder-steps", 2)


class Oracle:
    """A pipeline that knows the benchmark: draws and says what is right, or (right=False) a blank picture and nonsense."""

    def __init__(self, held_out: bool, right: bool = True) -> None:
        self.right, self.batches = right, []
        self.facts, self.targets, self.answers = {}, {}, {}
        for category in prompts.CATEGORIES:
            self.facts |= {prompt.text: prompt.facts for prompt in prompts.make_prompts(category, PER_CATEGORY, seed=0, held_out=held_out)}

    def generate(self, texts, *, seeds):
        self.batches.append(len(texts))
        return [render(realise(self.facts[text], np.random.default_rng(seed))) if self.right else Image.new("RGB", (128, 128))
                for text, seed in zip(texts, seeds, strict=True)]  # fmt: skip

    def reconstruct(self, images, *, seeds):
        return list(images) if self.right else [Image.new("RGB", (128, 128))] * len(images)

    def edit(self, images, instructions, *, seeds):
        return [self.targets[text, image.tobytes()] if self.right else image for image, text in zip(images, instructions, strict=True)]

    def describe(self):
        return {"model": "oracle"}

    def ask(self, question, *, images, max_new_tokens):
        return self.answers[question, images[0].tobytes()] if self.right else "I don't know."


@pytest.fixture
def oracle(monkeypatch):
    """oracle(held_out, right) that has also seen every edit and question that the benchmark makes."""

    def make(held_out, right=True):
        known = Oracle(held_out, right)
        edit, ask = edits.make_edit, questions.ask

        def seen_edit(*args, **kwargs):
            made = edit(*args, **kwargs)
            known.targets[made.instruction, render(made.source).tobytes()] = render(made.target)
            return made

        def seen_question(kind, scene, rng):
            made = ask(kind, scene, rng)
            if made is not None:
                known.answers[made.text, render(scene).tobytes()] = made.answer
            return made

        monkeypatch.setattr(edits, "make_edit", seen_edit)
        monkeypatch.setattr(questions, "ask", seen_question)
        return known

    return make


def evaluated(pipe, held_out):
    return shapes.evaluate(pipe, held_out=held_out, per_category=PER_CATEGORY, seeds=2, batch_size=5)[1]


@pytest.mark.parametrize("held_out", [True, False])
def test_what_is_right_scores_one_in_every_category(oracle, held_out):
    found = scores.summary(evaluated(oracle(held_out), held_out))
    assert {group: values["score"] for group, values in found.items() if group != "diversity"} == dict.fromkeys(shapes.TASKS, 1.0)
    assert tuple(found["prompts"]["categories"]) == prompts.CATEGORIES
    assert tuple(found["edits"]["categories"]) == edits.KINDS
    assert tuple(found["understanding"]["categories"]) == questions.KINDS
    for row in found["prompts"]["categories"].values():
        assert (row["right"], row["of"]) == (2 * PER_CATEGORY, 2 * PER_CATEGORY)
    assert found["diversity"] > 0.05
    assert "prompts" in scores.table(found) and "colour attribution" in scores.table(found)


def test_what_is_wrong_scores_nothing(oracle):
    results = evaluated(oracle(True, right=False), True)
    found = scores.summary(results)
    assert {group: values["score"] for group, values in found.items() if group != "diversity"} == dict.fromkeys(shapes.TASKS, 0.0)
    assert found["diversity"] == 0
    assert scores.common_faults(results)["edits"] == {"nothing was changed": 2 * PER_CATEGORY * len(edits.KINDS)}


def test_held_out_items_show_what_training_never_saw_and_seen_ones_do_not():
    for held_out in (True, False):
        for category in prompts.CATEGORIES:
            for prompt in prompts.make_prompts(category, PER_CATEGORY, seed=0, held_out=held_out):
                assert bool(held_out_facts(prompt.facts)) == held_out
        assert is_held_out(shapes._scene(np.random.default_rng(0), held_out)) == held_out


def test_a_batch_never_mixes_prompts_and_edits_and_holds_at_most_so_many(oracle):
    pipe = oracle(True)
    evaluated(pipe, True)
    assert max(pipe.batches) == 5 and sum(pipe.batches) == 2 * PER_CATEGORY * len(prompts.CATEGORIES)


def test_diversity_counts_pairs_of_one_prompt_only():
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (51, 51, 51))
    item, other = DrawItem("c", "a star"), DrawItem("c", "a ring")
    same = [Drawn(item, 0, black, None), Drawn(item, 1, black, None), Drawn(other, 0, grey, None)]
    assert scores.diversity(same) == 0
    assert scores.diversity([*same, Drawn(other, 1, black, None)]) == pytest.approx(0.1)
    assert scores.diversity(same[:1]) is None


def test_a_sheet_marks_right_and_wrong():
    picture = Image.new("RGB", (128, 128), "white")
    right, wrong = (Drawn(DrawItem("c", "a star"), 0, picture, Verdict(ok, "" if ok else "no star")) for ok in (True, False))
    colours = {colour for sheet in [scores.sheet([right, wrong], title="t")] for _, colour in sheet.getcolors(1 << 16)}
    assert {scores.RIGHT, scores.WRONG} <= colours


def test_shapes_writes_scores_results_and_sheets(cli, tmp_path):
    result = cli("evaluate", "shapes", "--per-category", 1, "--seeds", 1, "--only", "prompts", "--only", "understanding", "--json",
                 "--output", tmp_path / "out", *QUICK)  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["scores"]["prompts"]["score"] == 0, "a random network"
    assert set(report["scores"]) == {"prompts", "understanding"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(prompts.CATEGORIES) + len(questions.KINDS)
    assert all(line["reason"] for line in lines)
    assert Image.open(tmp_path / "out" / "prompts.png").width > 6 * 128


GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
           {"tag": "colors", "include": [], "prompt": "a photo of a red dog"}]  # fmt: skip


def test_geneval_gets_its_layout_and_what_is_there_is_skipped(cli, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    arguments = ("evaluate", "geneval", "--prompts", tmp_path / "metadata.jsonl", "--output", tmp_path / "out", "--seeds", 2, *QUICK)
    assert cli(*arguments).code == 0
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [f"0000{prompt}/{name}" for prompt in (0, 1) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    (tmp_path / "out/00000/samples/00001.png").unlink()
    assert "1 were there" in cli(*arguments).out
    assert sum(path.stat().st_mtime_ns == before.get(path) for path in (tmp_path / "out").rglob("*.png")) == 2, "the other prompt's"


def test_dpg_bench_gets_one_grid_per_prompt_and_wise_one_picture_per_id(cli, pipe, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "stanford12.txt").write_text("a long prompt\n")
    arguments = ("--prompts", tmp_path / "prompts", "--output", tmp_path / "dpg", "--batch-size", 1, *QUICK)
    assert cli("evaluate", "dpg-bench", *arguments).code == 0
    grid = Image.open(tmp_path / "dpg" / "stanford12.png")
    assert grid.size == (128, 128)
    expected = pipe.generate(["a long prompt"], seeds=[3], width=64, height=64, steps=2, decoder_steps=2)[0]
    assert grid.crop((64, 64, 128, 128)).tobytes() == expected.tobytes(), "the fourth picture has the fourth seed"
    (tmp_path / "wise.json").write_text(json.dumps([{"prompt_id": 7, "Prompt": "a lamp", "Category": "x"}]))
    assert cli("evaluate", "wise", "--prompts", tmp_path / "wise.json", "--output", tmp_path / "wise", *QUICK).code == 0
    assert [path.name for path in (tmp_path / "wise").iterdir()] == ["7.png"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("geneval", "--output", "x"), "needs --prompts"),
    (("shapes", "--per-category", 0), "must be at least 1"),
    (("wise", "--prompts", "missing.json", "--output", "x"), "can't be read"),
    (("shapes", "--prompts", "p"), "--prompts is for geneval"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(cli, arguments, message):
    result = cli("evaluate", *arguments)
    assert result.code == 1 and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(("name", "content", "message"), [
    ("geneval", "{}", "line 1: has no text 'prompt'"), ("geneval", "{", "no valid JSON"), ("geneval", "\n", "holds no prompts"),
    ("wise", "{}", "not a JSON list"), ("wise", '[{"prompt_id": "../x", "Prompt": "a"}]', "is no number or word"),
])  # fmt: skip
def test_damaged_prompt_files_are_named(cli, tmp_path, name, content, message):
    (tmp_path / "file").write_text(content)
    result = cli("evaluate", name, "--prompts", tmp_path / "file", "--output", tmp_path / "out")
    assert result.code == 1 and message in result.err
    assert not (tmp_path / "out").exists()


def test_two_processes_share_a_benchmark_and_give_the_results_of_one(cli, tiny_checkpoint, tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra train, which the environments of ComfyUI don't have")
    arguments = ("evaluate", "shapes", "--per-category", 1, "--seeds", 2, "--only", "prompts", "--only", "understanding", *QUICK)
    assert cli(*arguments, "--output", tmp_path / "one").code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen([*command(*arguments, "--model", tiny_checkpoint, "--device", "cpu", "--output", tmp_path / "two")],
                         env=command_environment() | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert (tmp_path / "one" / "results.jsonl").read_text() == (tmp_path / "two" / "results.jsonl").read_text()
