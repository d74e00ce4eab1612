"""Whatever stops a run, going on gives the same bytes as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..conftest import command_environment

STEPS, SAVE_EVERY = 16, 3


@pytest.fixture
def config(broken_material, train_config, shared):
    """A run in which everything that could be forgotten matters: dropout, a moving average, warm-up, a broken sample, workers."""

    def make(form: str, folder: Path, *, cached: bool = True):
        path = getattr(broken_material, form)
        return train_config(
            [{"path": str(path), "flip": 0.5, "caption_dropout": 0.2, "shuffle_buffer": 3}],
            train={"steps": STEPS, "ema_decay": 0.9, "gradient_accumulation": 2}, lora={"rank": 4, "dropout": 0.2},
            optimizer={"learning_rate": 1e-3, "warmup_steps": 3}, loader={"workers": 1},
            validation={"every": 5, "samples": 2, "timesteps": 2},
            output={"folder": str(folder), "save_every": SAVE_EVERY, "keep": 2},
            cache={"enabled": cached, "folder": str(shared / "cache")},
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def unbroken(config, finish, shared):
    """unbroken("tars", processes=2): the folder of the run that nothing stops; made once."""

    def make(form: str, *, processes: int = 1) -> Path:
        folder = shared / f"{form}-{processes}"
        if not (folder / "report.html").exists():
            finish(config(form, folder), processes=processes)
        return folder

    return make


def require_same_run(everything, logged, broken: Path, unbroken: Path) -> None:
    ours, theirs = everything(broken), everything(unbroken)
    kinds = {name.rpartition("/")[2].partition(":")[0] for name in theirs}
    assert kinds == {"trained.safetensors", "ema.safetensors", "optimizer", "blip3o_lora.safetensors"}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for kind, keys in (("train", ("step", "loss", "losses", "learning_rate", "grad_norm")), ("validation", ("step", "losses"))):
        lines = [[{key: line[key] for key in keys} for line in logged(folder, kind)] for folder in (broken, unbroken)]
        assert lines[0] == lines[1]
    assert len(logged(unbroken, "train")) == STEPS
    assert (broken / "broken.jsonl").read_bytes() == (unbroken / "broken.jsonl").read_bytes()


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_three_kills_at_any_moment_change_nothing(form, config, unbroken, start, finish, logged, everything, tmp_path):
    killed = config(form, tmp_path / "killed", cached=form == "folder")
    chance = random.Random(form)
    for attempt in range(3):
        goal = chance.randrange(1 + 4 * attempt, 4 + 4 * attempt)
        (job,) = start(killed, "output.resume=latest")
        job.until(lambda goal=goal: len(logged(tmp_path / "killed", "train")) >= goal)
        for _ in range(chance.randrange(20)):  # anywhere in an update, a checkpoint or a validation
            os.sched_yield()
        job.signal(signal.SIGKILL, group=chance.random() < 0.5)  # with or without its workers
        assert job.wait() == -signal.SIGKILL
    finish(killed, "output.resume=latest")
    require_same_run(everything, logged, tmp_path / "killed", unbroken(form))


def test_a_kill_while_a_checkpoint_is_written_changes_nothing(config, unbroken, start, finish, logged, everything, tmp_path):
    (job,) = start(config("folder", tmp_path / "killed"))
    job.until(lambda: any((tmp_path / "killed" / "checkpoints").glob(".step_00000009-*.tmp")))
    job.signal(signal.SIGKILL, group=True)
    job.wait()
    finish(config("folder", tmp_path / "killed"), "output.resume=latest")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
    require_same_run(everything, logged, tmp_path / "killed", unbroken("folder"))


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_two_processes_killed_together_change_nothing(form, config, unbroken, start, finish, logged, everything, tmp_path):
    jobs = start(config(form, tmp_path / "killed"), processes=2)
    jobs[0].until(lambda: len(logged(tmp_path / "killed", "train")) >= 8)
    for job in reversed(jobs):
        job.signal(signal.SIGKILL, group=True)
        assert job.wait() == -signal.SIGKILL
    finish(config(form, tmp_path / "killed"), "output.resume=latest", processes=2)
    require_same_run(everything, logged, tmp_path / "killed", unbroken(form, processes=2))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_update_saves_and_resumes_the_same(
    number, status, config, unbroken, start, finish, logged, everything, tmp_path
):  # fmt: skip
    stopped = config("tars", tmp_path / "stopped")
    (job,) = start(stopped)
    job.until(lambda: len(logged(tmp_path / "stopped", "train")) >= 7)
    job.signal(number, group=True)  # as the terminal and batch systems do: the workers get it too
    assert job.wait() == status
    done = logged(tmp_path / "stopped", "train")[-1]["step"]
    assert done < STEPS
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{done:08}").is_dir()
    assert "Traceback" not in job.err and "Error" not in job.err and "Exception" not in job.err, job.err
    assert [line["text"] for line in logged(tmp_path / "stopped", "event")] == ["stopped by a signal; saved"]
    assert not (tmp_path / "stopped" / "blip3o_lora.safetensors").exists()
    finish(stopped, "output.resume=latest")
    require_same_run(everything, logged, tmp_path / "stopped", unbroken("tars"))


def test_a_signal_to_one_of_two_processes_stops_both(config, unbroken, start, finish, logged, everything, tmp_path):
    stopped = config("folder", tmp_path / "stopped")
    jobs = start(stopped, processes=2)
    jobs[0].until(lambda: len(logged(tmp_path / "stopped", "train")) >= 7)
    jobs[1].signal(signal.SIGTERM, group=True)
    assert [job.wait() for job in jobs] == [143, 143], jobs[0].err + jobs[1].err
    finish(stopped, "output.resume=latest", processes=2)
    require_same_run(everything, logged, tmp_path / "stopped", unbroken("folder", processes=2))


def test_too_many_broken_samples_stop_all_processes_and_nothing_is_lost(config, unbroken, start, finish, logged, everything, tmp_path):
    jobs = start(config("folder", tmp_path / "stopped"), "loader.max_broken=0", processes=2)
    assert [job.wait() for job in jobs] == [1, 1]
    for job in jobs:
        assert "1 samples can't be used, more than loader.max_broken = 0" in job.err and "Traceback" not in job.err, job.err
    finish(config("folder", tmp_path / "stopped"), "output.resume=latest", processes=2)
    require_same_run(everything, logged, tmp_path / "stopped", unbroken("folder", processes=2))


def test_the_command_under_accelerate_launch_stops_at_sigterm_and_goes_on(
    config, unbroken, finish, logged, everything, free_port, tmp_path
):  # fmt: skip
    """The real launcher, which puts each rank into a session of its own and sends it the signal."""
    from blip3o_core.train.config import print_config

    file = tmp_path / "run.toml"
    file.write_text(print_config(config("folder", tmp_path / "stopped")), "utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
               "-m", "blip3o_core.train", str(file)]  # fmt: skip
    environment = command_environment() | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as launcher:
        try:
            for line in launcher.stderr:
                if "step 4/" in line and launcher.returncode is None:
                    launcher.send_signal(signal.SIGTERM)
                    break
            errors = launcher.stderr.read()
            launcher.wait(60)
        finally:
            launcher.kill()
    done = logged(tmp_path / "stopped", "train")[-1]["step"]
    assert 4 <= done < STEPS, errors
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{done:08}").is_dir(), errors
    finish(config("folder", tmp_path / "stopped"), "output.resume=latest", processes=2)
    require_same_run(everything, logged, tmp_path / "stopped", unbroken("folder", processes=2))
