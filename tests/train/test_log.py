"""What a run writes while it trains."""

import io
import json
import math
import re
import sys

import pytest
from PIL import Image

from blip3o_core.errors import InputError
from blip3o_core.train import log as log_module
from blip3o_core.train.log import RunLog, format_seconds, peak_memory_bytes, read_log

GIB = 2**30


@pytest.fixture
def clock(monkeypatch):
    """clock.now: the seconds that RunLog sees."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(log_module, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def open_log(tmp_path):
    def open_log(start_step: int = 0, *, total_steps: int = 10, log_every: int = 4, resumed: bool = False, **more) -> RunLog:
        return RunLog(tmp_path, total_steps=total_steps, start_step=start_step, config={"train": {"steps": total_steps}},
                      log_every=log_every, resumed=resumed, **more)  # fmt: skip

    return open_log


def update(run: RunLog, step: int, loss: float | None = None, losses: dict[str, float] | None = None, **more) -> None:
    loss = float(step) if loss is None else loss
    values = {"learning_rate": step / 1000, "grad_norm": 2.0 * step, "samples": 8, "memory_bytes": step * GIB} | more
    run.train(step, loss=loss, losses={"text_to_image": loss} if losses is None else losses, **values)


def of_kind(folder, kind: str) -> list[dict]:
    return [line for line in read_log(folder) if line["kind"] == kind]


def test_lines_hold_the_means_since_the_line_before_and_the_last_step_has_one(tmp_path, open_log, clock):
    with open_log() as run:
        for step in range(1, 11):
            clock.now += 0.5
            # edit is part of every other update only: its mean is over those
            update(run, step, losses={"text_to_image": float(step), **({"edit": 10.0 * step} if step % 2 else {})})
        assert of_kind(tmp_path, "train")[-1]["step"] == 10, "the last step is logged before the run is closed"
    lines = of_kind(tmp_path, "train")
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["loss"] for line in lines] == [2.5, 6.5, 9.5]
    assert [line["losses"] for line in lines] == [
        {"text_to_image": 2.5, "edit": 20.0}, {"text_to_image": 6.5, "edit": 60.0}, {"text_to_image": 9.5, "edit": 90.0},
    ]  # fmt: skip
    assert [line["grad_norm"] for line in lines] == [5.0, 13.0, 19.0]
    assert [line["learning_rate"] for line in lines] == [0.004, 0.008, 0.01]
    assert [line["memory_bytes"] for line in lines] == [4 * GIB, 8 * GIB, 10 * GIB]
    assert [line["samples_per_second"] for line in lines] == [16.0, 16.0, 16.0]
    assert [line["seconds"] for line in lines] == [2.0, 4.0, 5.0]


@pytest.mark.parametrize("kind", ["validation", "pictures", "event"])
def test_pauses_for_other_things_do_not_slow_the_throughput(tmp_path, open_log, clock, kind):
    with open_log(total_steps=4) as run:
        for step in range(1, 5):
            clock.now += 0.5
            update(run, step)
            if step == 2:
                clock.now += 60
                if kind == "validation":
                    run.validation(step, {"edit": 1.0})
                elif kind == "pictures":
                    run.pictures(step, Image.new("RGB", (8, 8)), tmp_path / "samples" / "step.png")
                else:
                    run.event(step, "saved")
    (line,) = of_kind(tmp_path, "train")
    assert line["samples_per_second"] == 16.0
    assert line["seconds"] == 62.0


def test_a_stopped_run_writes_the_updates_that_no_line_holds_yet(tmp_path, open_log):
    with pytest.raises(KeyboardInterrupt), open_log() as run:
        for step in range(1, 7):
            update(run, step)
        raise KeyboardInterrupt
    assert [(line["step"], line["loss"]) for line in of_kind(tmp_path, "train")] == [(4, 2.5), (6, 5.5)]


def test_every_line_is_on_disk_at_once(tmp_path, open_log):
    with open_log() as run:
        run.event(0, "first")
        assert [line["text"] for line in of_kind(tmp_path, "event")] == ["first"]


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path, open_log):
    with open_log(log_every=1) as run:
        update(run, 1, loss=math.nan, grad_norm=math.inf)
        run.validation(1, {"edit": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(text, parse_constant=refuse) for text in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    train = next(line for line in lines if line["kind"] == "train")
    assert (train["loss"], train["losses"], train["grad_norm"]) == (None, {"text_to_image": None}, None)
    assert lines[-1] == {"kind": "validation", "step": 1, "losses": {"edit": None}}


def test_resume_drops_lines_beyond_the_checkpoint_and_a_half_line(tmp_path, open_log, clock):
    with open_log() as run:
        for step in range(1, 9):
            clock.now += 1
            update(run, step)
            run.event(step, f"event {step}")
    with (tmp_path / "log.jsonl").open("ab") as file:  # as kill -9 leaves it, in the middle of a letter
        file.write('{"kind": "event", "step": 3, "text": "hälf'.encode()[:-3])
    assert [line["step"] for line in of_kind(tmp_path, "event")] == list(range(1, 9)), "reading passes over the half line"
    with open_log(4, resumed=True) as run:
        assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2, 3, 4, 4, 4]
        for step in range(5, 9):
            clock.now += 1
            update(run, step, loss=100.0)
    assert [(line["step"], line["loss"], line["seconds"]) for line in of_kind(tmp_path, "train")] == [(4, 2.5, 4.0), (8, 100.0, 8.0)]
    assert [line["text"] for line in of_kind(tmp_path, "event")] == ["event 1", "event 2", "event 3", "event 4"]
    assert [(line["step"], line["resumed"]) for line in of_kind(tmp_path, "run")] == [(0, False), (4, True)]
    for text in (tmp_path / "log.jsonl").read_text("utf-8").splitlines():
        json.loads(text)


def test_a_fresh_run_does_not_keep_the_log_of_one_that_died_before_its_first_checkpoint(tmp_path, open_log):
    with open_log() as run:
        run.event(0, "old")
    with open_log() as run:
        run.event(0, "new")
    assert [line["text"] for line in of_kind(tmp_path, "event")] == ["new"]


def tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="the extra train is not installed")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    return events.Reload()


def test_tensorboard_holds_the_same_numbers_and_pictures(tmp_path, open_log, clock):
    sheet = Image.effect_noise((40, 30), 50).convert("RGB")
    with open_log(total_steps=8) as run:
        for step in range(1, 9):
            clock.now += 0.5
            update(run, step)
        run.validation(8, {"edit": 0.25, "text": math.nan})
        run.pictures(8, sheet, tmp_path / "samples" / "step_00000008.png")
    events = tensorboard(tmp_path)

    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    lines = of_kind(tmp_path, "train")
    for name in ("loss", "learning_rate", "grad_norm", "samples_per_second"):
        assert scalars(f"train/{name}") == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert scalars("train/loss_text_to_image") == [(4, 2.5), (8, 6.5)]
    assert scalars("train/memory_gib") == [(4, 4.0), (8, 8.0)]
    assert scalars("validation/loss_edit") == [(8, 0.25)]
    assert "validation/loss_text" not in events.Tags()["scalars"], "no number, no point"
    (image,) = events.Images("samples/0")
    assert list(Image.open(io.BytesIO(image.encoded_image_string)).getdata()) == list(sheet.getdata())
    assert of_kind(tmp_path, "pictures") == [{"kind": "pictures", "step": 8, "file": "samples/step_00000008.png"}]


def test_tensorboard_forgets_what_lies_beyond_the_checkpoint_and_keeps_its_own_step(tmp_path, open_log):
    with open_log(log_every=1) as run:
        for step in range(1, 7):
            update(run, step)
    with open_log(4, log_every=1, resumed=True) as run:
        update(run, 5, loss=50.0)
    assert [(event.step, event.value) for event in tensorboard(tmp_path).Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0),
    ]  # fmt: skip


def test_without_a_terminal_each_logged_step_is_one_plain_line(open_log, clock, capsys):
    with open_log(2, total_steps=10_000, log_every=4) as run:
        for step in range(3, 9):
            clock.now += 0.5
            update(run, step, learning_rate=1e-4, memory_bytes=int(1.5 * GIB))
        run.validation(8, {"edit": 0.5})
        run.validation(8, {"edit": 0.4})
    # step 8: 6 updates in 3 s, so 9992 more take 4996 s
    assert capsys.readouterr().err.splitlines() == [
        "step 4/10000  loss 3.5000  lr 1.00e-04  16.00 samples/s  1:23:18 left  1.5 GiB",
        "step 8/10000  loss 6.5000  lr 1.00e-04  16.00 samples/s  1:23:16 left  1.5 GiB",
        "step 8/10000  validation: edit 0.5000",
        "step 8/10000  validation: edit 0.4000 (-20.0 % since the start)",
    ]


def test_on_a_terminal_a_bar_starts_at_the_resumed_step_and_other_lines_stand_above_it(open_log, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with open_log(5, total_steps=10, log_every=100) as run:
        for step in range(6, 9):
            update(run, step, learning_rate=1e-4, memory_bytes=GIB)
        run.event(8, "saved checkpoint-8")
    text = sys.stderr.getvalue()
    assert re.search(r"training:\s+50%\|.*\| 5/10", text), "the bar begins where the run does"
    assert re.search(r"8/10 \[.*step.*loss 6\.2900, lr 1\.00e-04, 1\.0 GiB\]", text)  # 0.81 * 6 + 0.09 * 7 + 0.1 * 8
    assert re.search(r"\rstep 8/10  saved checkpoint-8\n", text)
    assert "samples/s" not in text, "no plain lines beside a bar"


def test_a_process_without_stderr_can_train(open_log, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # pythonw on Windows
    with open_log(log_every=1) as run:
        update(run, 1)
        run.event(1, "saved")
    assert len(of_kind(tmp_path, "train")) == 1
    assert capsys.readouterr().out == "", "stdout is for results"


@pytest.mark.parametrize(("package", "extra"), [("tensorboard", "train"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, open_log, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package} .*comfyui-blip3o\[{extra}\]"):
        open_log(wandb="cats")
    assert not list(tmp_path.iterdir()), "the next try still finds an empty folder"


def test_wandb_gets_the_same_names_and_a_resumed_run_keeps_its_id(open_log, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    monkeypatch.setattr(wandb.Run, "log", lambda self, values, **_: logged.append(values))
    for start in (0, 4):
        with open_log(start, wandb="cats", resumed=start > 0) as run:
            for step in range(start + 1, start + 5):
                update(run, step)
            run.validation(start + 4, {"edit": 0.5})
            run.pictures(start + 4, Image.new("RGB", (8, 8)), tmp_path / "samples" / "step.png")
    assert [values["step"] for values in logged] == [4, 4, 4, 8, 8, 8]
    assert logged[0]["train/loss"] == 2.5
    assert logged[1]["validation/loss_edit"] == 0.5
    assert isinstance(logged[2]["samples/0"], wandb.Image)
    first, second = (line["wandb_id"] for line in of_kind(tmp_path, "run"))
    assert first == second
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))


def test_a_log_that_cannot_be_read_whole_gives_the_lines_that_can(tmp_path):
    assert read_log(tmp_path) == []
    lines = [b'{"kind": "event", "step": 1}', bytes(3), b"[1]", b'{"step": 2}', b'{"kind": "event"}', b'{"kind": "event", "step": 3}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_log(tmp_path)] == [1, 3]


def test_peak_memory_grows_with_what_the_process_holds(monkeypatch):
    before = peak_memory_bytes("cpu")
    held = bytearray(max(before, 2**20))  # touched, so resident
    held[::4096] = b"x" * len(held[::4096])
    if sys.platform != "win32":
        assert before > 2**20
        assert peak_memory_bytes("cpu") > before + len(held) // 4
    monkeypatch.setattr(log_module, "resource", None)
    assert peak_memory_bytes("cpu") == 0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00")])
def test_durations_read_as_hours_minutes_seconds(seconds, text):
    assert format_seconds(seconds) == text
