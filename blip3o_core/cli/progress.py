"""Progress on stderr: one bar per stage, with rate and remaining time; results go to stdout without tearing a bar."""

import sys

from tqdm import tqdm


class ProgressBars:
    """The `on_load` and `on_step` callbacks of a pipeline as tqdm bars. A context manager that closes what is open."""

    def __init__(self) -> None:
        self.title = ""
        self._bar: tqdm | None = None
        self._key: tuple[str, int] | None = None

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_load(self, component: str, done: int, total: int) -> None:
        """Bytes of one component."""
        self._advance(f"loading {component}", done, total, unit="B", unit_scale=True, unit_divisor=1024)

    def on_write(self, file: str, done: int, total: int) -> None:
        """Bytes of one file."""
        self._advance(f"writing {file}", done, total, unit="B", unit_scale=True, unit_divisor=1024)

    def on_step(self, stage: str, done: int, total: int) -> None:
        """Steps of one stage."""
        self._advance(f"{self.title}: {stage}" if self.title else stage, done, total, unit="step")

    def on_item(self, name: str, done: int, total: int) -> None:
        """Things of a list, as pictures of a folder."""
        self._advance(name, done, total, unit="picture")

    def on_round(self, name: str, done: int, total: int) -> None:
        """Rounds of a measurement."""
        self._advance(name, done, total, unit="round")

    def write(self, line: str) -> None:
        """A result, on stdout."""
        self.close()
        print(line, file=sys.stdout, flush=True)

    def close(self) -> None:
        """Ends the open bar, so that something else can be printed."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._key = None

    def _advance(self, name: str, done: int, total: int, **style) -> None:
        if self._key != (name, total) or (self._bar is not None and done < self._bar.n):
            self.close()
            self._bar = tqdm(total=total, desc=name, file=sys.stderr, dynamic_ncols=True, leave=True, **style)
            self._key = (name, total)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()
