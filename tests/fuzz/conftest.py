"""Fuzzing: each property is tried with some cases that are always the same, and under the mark nightly with many that never are.

A case may give a result or an error of the Blip3oError family. It may not raise anything else, take longer than DEADLINE_S, or add
more than MAX_GROWTH to the memory. The table at the end says what was tried and what it took.
"""

import json
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..conftest import command_environment

hypothesis = pytest.importorskip("hypothesis", reason="fuzzing needs the package hypothesis, which the extra test installs")

DEADLINE_S = 20
"""Of one case, which takes a quarter of a second; machines of tests are slow at times, a hang is for ever."""
START_TIMEOUT_S = 180
MAX_GROWTH = 512 * 2**20
NIGHTLY_TIMEOUT_S = 3600
CAMPAIGNS = pytest.StashKey[list["Campaign"]]()

PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # cases are small as they are; shrinking a hang would wait for it often
ALWAYS = {"deadline": None, "database": None, "print_blob": True, "phases": PHASES, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("ci", derandomize=True, **ALWAYS)
hypothesis.settings.register_profile("nightly", **ALWAYS)


@dataclass
class Campaign:
    """What one test has tried."""

    name: str
    profile: str
    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    peak_bytes: int = 0

    def __call__(self, check: Callable[..., str], *, ci: int, nightly: int, **strategies: Any) -> None:
        """Calls `check` with drawn values, as many times as the profile says; it returns what became of the case."""
        began = time.monotonic()
        cases = {"ci": ci, "nightly": nightly}[self.profile]

        def counted(**values: Any) -> None:
            self.outcomes[check(**values)] += 1

        counted.__qualname__ = check.__qualname__  # cases that are always the same are drawn from the name
        settings = hypothesis.settings(hypothesis.settings.get_profile(self.profile), max_examples=cases)
        try:
            settings(hypothesis.given(**strategies)(counted))()
        finally:
            self.seconds += time.monotonic() - began
        assert self.outcomes.total() >= cases, f"{self.outcomes.total()} of {cases} cases were drawn"


@pytest.fixture(params=["ci", pytest.param("nightly", marks=[pytest.mark.nightly, pytest.mark.timeout(NIGHTLY_TIMEOUT_S)])])
def fuzz(request: pytest.FixtureRequest) -> Campaign:
    """fuzz(check, ci=20, nightly=300, **strategies): see Campaign."""
    campaign = Campaign(request.node.originalname, request.param)
    request.config.stash.setdefault(CAMPAIGNS, []).append(campaign)
    return campaign


@pytest.fixture
def fuzz_once() -> Campaign:
    """For single cases, which no table counts."""
    return Campaign("", "ci")


class Worker:
    """The process of worker.py. One that hangs or has died is replaced for the next case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def __call__(self, campaign: Campaign, target: str, *, allowed_bytes: int = MAX_GROWTH, **arguments: Any) -> str:
        """Runs a case -> "accepted" or "refused". Fails for everything else, for a hang, and for too much memory."""
        if self._process is None:
            self._start()
        answer = self._ask({"target": target, **arguments})
        campaign.peak_bytes = max(campaign.peak_bytes, answer["peak_bytes"])
        assert answer["outcome"] != "broken", f"{target}: an error that is not documented\n{answer['detail']}"
        assert answer["peak_bytes"] <= allowed_bytes, f"{target}: the case took {answer['peak_bytes'] / 2**20:.0f} MiB"
        if answer["outcome"] == "refused":
            assert len(answer["detail"]) < 5000, f"{target}: a message that nobody reads\n{answer['detail']}"
        return answer["outcome"]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                cwd=self._folder, env=command_environment() | {"OMP_NUM_THREADS": "1"}, text=True,
            )  # fmt: skip
        self._answer(START_TIMEOUT_S)

    def _ask(self, case: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._answer(DEADLINE_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """One case, one line: what `select` sees is a whole answer, or the end of the process."""
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            self._process.send_signal(signal.SIGUSR1)  # its stack goes to the log
            time.sleep(1)
            self.stop()
            raise AssertionError(f"no answer in {timeout_s} s\n{self._end_of_log()}")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._process = None
            raise AssertionError(f"the process has died with status {status}\n{self._end_of_log()}")
        return json.loads(line)

    @property
    def _log(self) -> Path:
        return self._folder / "worker.log"

    def _end_of_log(self) -> str:
        return self._log.read_text("utf-8", "replace")[-4000:]


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of docs/reliability.md."""
    if not (campaigns := config.stash.get(CAMPAIGNS, [])):
        return
    terminalreporter.section("fuzzing")
    terminalreporter.line("| target | cases | accepted | refused | seconds | memory of the largest case |")
    terminalreporter.line("|---|---|---|---|---|---|")
    for name in dict.fromkeys(campaign.name for campaign in campaigns):
        own = [campaign for campaign in campaigns if campaign.name == name]
        found = sum((campaign.outcomes for campaign in own), Counter())
        terminalreporter.line(f"| {name.removeprefix('test_').replace('_', ' ')} | {found.total()} | {found['accepted']} | "
                              f"{found['refused']} | {sum(campaign.seconds for campaign in own):.0f} | "
                              f"{max(campaign.peak_bytes for campaign in own) / 2**20:.0f} MiB |")
    terminalreporter.line(f"{sum(campaign.outcomes.total() for campaign in campaigns)} cases in "
                          f"{sum(campaign.seconds for campaign in campaigns):.0f} s")
