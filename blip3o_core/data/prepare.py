"""Sample -> Example: decoded, augmented, tokenised, or looked up in the cache. Runs in the data workers; pure in its arguments."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..images import eva_pixel_values, load_image, load_image_bytes, qwen_pixel_values
from ..models.eva_clip import EMBEDDING_GRID
from ..prompts import RECONSTRUCT_INSTRUCTION, PromptTokenizer
from .broken import BrokenSample
from .cache import FeatureCache, content_key
from .sample import GENERATION_TASKS, WRITING_TASKS, ImageSource, Sample
from .transforms import augment

PROMPT_IMAGE_SIDE = 448  # of pictures before an instruction, as when drawing
LABELS = 16
"""Different labels in one channel of a map."""
_NOTICEABLE, _NOTICEABLE_SHARE = 32, 0.02  # a pixel has changed by so much of 255, a cell in so many of its pixels
DRAW_STREAM, CROP_STREAM = 1, 2  # keep the random numbers of a draw apart from those of the order, and the crop from the rest


@dataclass
class Example:
    """What the networks need of one sample; fields that its task has no use for are empty."""

    name: str
    task: str
    position: int
    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)  # of a conversation: the ids that an assistant writes
    pixel_values: Tensor | None = None  # (patches, 1176) of pictures in the prompt
    grid_thw: Tensor | None = None  # (images, 3)
    target_pixels: Tensor | None = None  # (3, S, S) for EVA-CLIP
    picture: Tensor | None = None  # (3, side, side) in -1..1 for the VAE
    target: Tensor | None = None  # cached embedding (C, 8, 8)
    states: Tensor | None = None  # cached query states (Q, H)
    target_key: str = ""
    states_key: str = ""
    label_shares: Tensor | None = None  # (channels, cells, LABELS) of each cell's area; when drawing, of the cells of the embedding
    changed: Tensor | None = None  # of an edit, if asked for: (64,) bool, whether the cell of the embedding differs from the source


@dataclass(frozen=True)
class Augmentation:
    """Of one dataset; see the options of [[data]]."""

    trigger: str = ""
    caption_dropout: float = 0.0
    flip: float = 0.0
    crop: str = "centre"


@dataclass(frozen=True)
class Preparer:
    """`preparer(sample, position)`; the same position always gives the same example."""

    tokenizer: PromptTokenizer
    augmentation: Augmentation
    seed: int
    eva_size: int  # side in pixels of EVA-CLIP's input
    picture_size: int = 0  # side in pixels for the VAE
    labels_embedding: bool = False  # maps of labels are for the tokens of a CLIP embedding, not for those of the backbone's eyes
    marks_changes: bool = False  # tells what an edit changes, see Example.changed
    image_side: int | None = None  # of a model whose eyes know one size only; see Blip3oCheckpoint.image_side
    closed_turn: bool = False
    max_pixels: int = 448 * 448
    max_tokens: int = 512
    targets: FeatureCache | None = None
    states: FeatureCache | None = None

    def __call__(self, sample: Sample, position: int) -> Example:
        """Raises BrokenSample if a picture can't be read or a conversation is too long."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, position, DRAW_STREAM]))
        flipped, dropped = rng.random() < self.augmentation.flip, rng.random() < self.augmentation.caption_dropout
        return self._prepare(sample, position, flipped=flipped, dropped=dropped)

    def variants(self, sample: Sample) -> Iterator[Example]:
        """All examples that draws of this sample can become, for filling the cache; a random crop has no end of them."""
        for flipped in possible(self.augmentation.flip):
            for dropped in possible(self.augmentation.caption_dropout):
                yield self._prepare(sample, 0, flipped=flipped, dropped=dropped)

    def _prepare(self, sample: Sample, position: int, *, flipped: bool, dropped: bool) -> Example:
        example = Example(sample.name, sample.task, position)
        try:
            if sample.task in GENERATION_TASKS:
                self._prompt(example, sample, flipped, dropped)
                self._target(example, sample, flipped)
            elif sample.task in WRITING_TASKS:
                self._conversation(example, sample, flipped)
            elif sample.task == "segment":
                self._segments(example, sample, flipped)
            else:
                self._picture(example, sample, flipped)
        except (InputError, OSError) as error:
            raise BrokenSample(sample.name, str(error)) from error
        return example

    def _prompt(self, example: Example, sample: Sample, flipped: bool, dropped: bool) -> None:
        images = sample.images
        if sample.task == "reconstruct":
            text, images = RECONSTRUCT_INSTRUCTION, (sample.target,)
        elif dropped:
            text = ""
        else:
            text = with_trigger(sample.text, self.augmentation.trigger)
        if self.states is not None:
            example.states_key = content_key(images, text, flipped and bool(images), self.closed_turn, sample.task == "reconstruct")
            example.states = self.states.load(example.states_key)
            if example.states is not None:
                return
        counts: list[int] = []
        if images:
            side = self.image_side or PROMPT_IMAGE_SIDE
            if sample.task == "reconstruct":  # the part of the picture that EVA-CLIP sees, as in the reference
                pictures = [picture_square(self._augmented(example, sample, flipped), side)]
            else:
                pictures = [mirrored(open_picture(image, sample.name), flipped) for image in images]
            example.pixel_values, example.grid_thw = qwen_pixel_values(pictures, size=(side, side))
            counts = token_counts(example.grid_thw)
        example.ids = self.tokenizer.training_ids(text, image_tokens=counts, closed=self.closed_turn)

    def _target(self, example: Example, sample: Sample, flipped: bool) -> None:
        if sample.labels is not None:
            example.label_shares = self._embedding_labels(mirrored(open_picture(sample.labels, sample.name), flipped))
        if self.marks_changes and sample.task == "edit":
            source, target = (mirrored(open_picture(image, sample.name), flipped) for image in (sample.images[0], sample.target))
            example.changed = changed_cells(source, target, EMBEDDING_GRID)
        if self.targets is not None:
            example.target_key = content_key((sample.target,), flipped, self.augmentation.crop, self.eva_size)
            example.target = self.targets.load(example.target_key)
            if example.target is not None:
                return
        picture = self._augmented(example, sample, flipped)
        example.target_pixels = eva_pixel_values([picture], size=self.eva_size)[0]

    def _conversation(self, example: Example, sample: Sample, flipped: bool) -> None:
        counts: list[int] = []
        if sample.images:
            pictures = [mirrored(open_picture(image, sample.name), flipped) for image in sample.images]
            example.pixel_values, example.grid_thw = qwen_pixel_values(pictures, **self._pixel_bounds)
            counts = token_counts(example.grid_thw)
        example.ids, example.learned = self.tokenizer.conversation_ids(sample.turns, counts)
        if len(example.ids) > self.max_tokens:
            raise BrokenSample(sample.name, f"the conversation has {len(example.ids)} tokens, loader.max_tokens is {self.max_tokens}")
        if not any(example.learned):
            raise BrokenSample(sample.name, "the conversation has no answer to learn")

    def _segments(self, example: Example, sample: Sample, flipped: bool) -> None:
        picture, labels = (mirrored(open_picture(source, sample.name), flipped) for source in (sample.images[0], sample.target))
        if self.labels_embedding:
            example.target_pixels = eva_pixel_values([picture], size=self.eva_size)[0]
            example.label_shares = self._embedding_labels(labels)
            return
        example.pixel_values, example.grid_thw = qwen_pixel_values([picture], **self._pixel_bounds)
        rows, columns = (int(length) // 2 for length in example.grid_thw[0, 1:])
        example.label_shares = label_shares(labels, rows, columns)
        example.ids, _ = self.tokenizer.conversation_ids((("user", ""), ("assistant", "")), [rows * columns])

    def _embedding_labels(self, labels: Image.Image) -> Tensor:
        """A map -> shares (channels, 64, LABELS) in the part of the picture that EVA-CLIP sees."""
        square = picture_square(labels, self.eva_size, Image.Resampling.NEAREST)
        return label_shares(square, EMBEDDING_GRID, EMBEDDING_GRID)

    @property
    def _pixel_bounds(self) -> dict[str, int]:
        if self.image_side is None:
            return {"min_pixels": 784, "max_pixels": self.max_pixels}
        return dict.fromkeys(("min_pixels", "max_pixels"), self.image_side**2)

    def _augmented(self, example: Example, sample: Sample, flipped: bool) -> Image.Image:
        """The same each time for one example."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, example.position, CROP_STREAM]))
        return augment(open_picture(sample.target, sample.name), rng, flip=float(flipped), crop=self.augmentation.crop)[0]

    def _picture(self, example: Example, sample: Sample, flipped: bool) -> None:
        picture = None
        if sample.task in ("decode", "contrast"):
            if self.targets is not None and sample.task == "decode":
                example.target_key = content_key((sample.target,), flipped, self.augmentation.crop, self.eva_size)
                example.target = self.targets.load(example.target_key)
            if example.target is None:
                picture = self._augmented(example, sample, flipped)
                example.target_pixels = eva_pixel_values([picture], size=self.eva_size)[0]
        if sample.task == "contrast":
            example.ids = self.tokenizer.ids([with_trigger(sample.text, self.augmentation.trigger)])[: self.max_tokens]
            return
        picture = picture or self._augmented(example, sample, flipped)
        square = picture_square(picture, self.picture_size)
        example.picture = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def label_shares(labels: Image.Image, rows: int, columns: int) -> Tensor:
    """How much of each cell of a grid each label covers (channels, rows * columns, LABELS), float32, each row sums to 1.

    labels: a picture whose channels are maps of labels, each below LABELS. Raises InputError for a larger one.
    """
    side = 8  # samples of a cell along each axis
    sampled = np.asarray(labels.resize((columns * side, rows * side), Image.Resampling.NEAREST))  # (H, W, channels)
    if int(sampled.max()) >= LABELS:
        raise InputError(f"a map of labels holds {int(sampled.max())}; labels are 0 to {LABELS - 1}.")
    cells = sampled.reshape(rows, side, columns, side, -1).transpose(4, 0, 2, 1, 3).reshape(sampled.shape[2], rows * columns, side * side)
    return torch.from_numpy((cells[..., None] == np.arange(LABELS)).mean(axis=2, dtype=np.float32))


def changed_cells(source: Image.Image, target: Image.Image, grid: int) -> Tensor:
    """Whether a cell of the centre square of the target differs from the source (grid * grid,) bool; the noise of a JPEG doesn't count."""
    side = 16 * grid
    squares = [np.asarray(picture_square(image, side), dtype=np.int16) for image in (source, target)]  # (side, side, 3) each
    differs = np.abs(squares[0] - squares[1]).max(axis=2) > _NOTICEABLE
    cells = differs.reshape(grid, 16, grid, 16).transpose(0, 2, 1, 3).reshape(grid * grid, 16 * 16)
    return torch.from_numpy(cells.mean(axis=1) > _NOTICEABLE_SHARE)


def possible(share: float) -> tuple[bool, ...]:
    """What a draw with this probability of True can give."""
    return (*((False,) if share < 1 else ()), *((True,) if share > 0 else ()))


def open_picture(source: ImageSource, name: str) -> Image.Image:
    """Upright RGB. Raises InputError."""
    return load_image_bytes(source, name) if isinstance(source, bytes) else load_image(source)


def mirrored(image: Image.Image, flipped: bool) -> Image.Image:
    """Left to right, or as it is."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


def picture_square(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The centre square, `side` pixels wide: short side to size, then crop."""
    short = min(image.size)
    image = image.resize([max(side, round(side * length / short)) for length in image.size], resample)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def token_counts(grid_thw: Tensor) -> list[int]:
    """Features of each image: a quarter of its patches."""
    return [int(t * h * w) // 4 for t, h, w in grid_thw]


def with_trigger(text: str, trigger: str) -> str:
    """`trigger, text`, or whichever of both there is."""
    return ", ".join(part for part in (trigger, text) if part)
