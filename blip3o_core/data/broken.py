"""One sample that can't be read: reported and stepped over, not the end of the run."""


class BrokenSample(Exception):
    """`name` is the file, record or tar member, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
