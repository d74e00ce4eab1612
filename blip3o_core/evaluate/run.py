"""Draws and asks what a benchmark lists. Processes started by `accelerate launch` share the work."""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ..runtime import require_package
from .items import Answered, AskItem, DrawItem, Drawn

if TYPE_CHECKING:
    from ..pipelines.blip3o import Blip3oPipeline

T = TypeVar("T")
OnItem = Callable[[str, int, int], None]
"""(what, done, of how many in this process)"""

MAX_ANSWER_TOKENS = 96


class Share:
    """This process's part of a list, and all parts put together again. Alone: the whole list."""

    def __init__(self) -> None:
        self._state = None
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            accelerate = require_package("accelerate", extra="train", purpose="sharing an evaluation among processes")
            self._state = accelerate.PartialState()
            self.rank, self.world = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def of(self, everything: Sequence[T]) -> list[T]:
        """Every world-th, so that slow categories are spread."""
        return list(everything[self.rank :: self.world])

    def together(self, own: list[T]) -> list[T]:
        """The results of all processes in the order of the whole list, on every process; they must pickle."""
        if self._state is None:
            return own
        from accelerate.utils import gather_object

        parts = gather_object([own])
        rows = itertools.zip_longest(*parts, fillvalue=_NOTHING)
        return [result for row in rows for result in row if not isinstance(result, _Nothing)]


class _Nothing:
    """What a shorter part lacks; recognised by type, since it may have been pickled."""


_NOTHING = _Nothing()


def run_drawing(
    pipe: "Blip3oPipeline", items: Sequence[DrawItem], seeds: Sequence[int], *, batch_size: int = 8, settings: dict[str, Any] | None = None,
    share: Share | None = None, on_item: OnItem | None = None,
) -> list[Drawn]:  # fmt: skip
    """Every item with every seed. But for rounding, pictures don't depend on batch size or number of processes.

    settings: arguments of `Blip3oPipeline.generate`, for items of all kinds.
    """
    share = share or Share()
    jobs = share.of([(index, seed) for index in range(len(items)) for seed in seeds])
    drawn: list[tuple[int, int, Image.Image]] = []
    for kind, group in itertools.groupby(jobs, lambda job: _kind(items[job[0]])):
        for batch in _batches(list(group), batch_size):
            own = [items[index] for index, _ in batch]
            pictures = _draw(pipe, kind, own, [seed for _, seed in batch], settings or {})
            drawn += [(index, seed, picture) for (index, seed), picture in zip(batch, pictures, strict=True)]
            if on_item is not None:
                on_item("drawing", len(drawn), len(jobs))
    return [
        Drawn(items[index], seed, picture, None if items[index].judge is None else items[index].judge(picture))
        for index, seed, picture in share.together(drawn)
    ]


def run_asking(
    pipe: "Blip3oPipeline", items: Sequence[AskItem], *, share: Share | None = None, on_item: OnItem | None = None
) -> list[Answered]:
    """Greedy answers."""
    share = share or Share()
    jobs = share.of(list(range(len(items))))
    answers = []
    for done, index in enumerate(jobs, start=1):
        images = None if items[index].source is None else [items[index].source]
        answers.append((index, pipe.ask(items[index].question, images=images, max_new_tokens=MAX_ANSWER_TOKENS)))
        if on_item is not None:
            on_item("asking", done, len(jobs))
    return [Answered(items[index], answer, items[index].judge(answer)) for index, answer in share.together(answers)]


def _kind(item: DrawItem) -> str:
    if item.source is None:
        return "generate"
    return "reconstruct" if item.text is None else "edit"


def _batches(jobs: list[T], size: int) -> list[list[T]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def _draw(
    pipe: "Blip3oPipeline", kind: str, items: list[DrawItem], seeds: list[int], settings: dict[str, Any]
) -> list[Image.Image]:  # fmt: skip
    if kind == "generate":
        return pipe.generate([item.text for item in items], seeds=seeds, **settings)
    sources = [item.source for item in items]
    if kind == "edit":
        return pipe.edit(sources, [item.text for item in items], seeds=seeds, **settings)
    names = {"decoder_steps": "steps", "decoder_guidance_scale": "guidance_scale", "width": "width", "height": "height"}
    return pipe.reconstruct(sources, seeds=seeds, **{names[name]: value for name, value in settings.items() if name in names})
