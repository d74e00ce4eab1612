"""Understanding: questions about images and text, and conversations that keep their key-value cache from turn to turn."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..images import load_image_bytes, qwen_pixel_values, to_rgb_images
from ..models.qwen_positions import Grid, multimodal_positions
from ..prompts import CLOSE_TURN, SYSTEM, open_turn, require_text, turn
from ..sampling.tokens import PickToken, token_picker
from .language import LanguageModels, image_features, merged_grids

MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 16384 * 28 * 28  # of the Qwen2.5-VL processor
MAX_NEW_TOKENS = 512
FORMAT = "blip3o-chat-1"
INCOMPLETE = "\ufffd"  # how a decoder shows a character whose last bytes are still to come

OnToken = Callable[[str], bool | None]
"""Called after every token with the new piece of the answer, empty while a character is incomplete. Return False to stop there,
raise to cancel the turn."""


@dataclass
class Message:
    """One turn. Images are RGB; pixel budgets are those that the turn was read with, so that a saved chat reads them so again."""

    role: str
    text: str
    images: list[Image.Image] = field(default_factory=list)
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    ids: list[int] | None = None  # of an answer, without the token that ended it


class Chat:
    """A conversation. What was read once is kept in the cache: a new turn only reads itself."""

    def __init__(self, models: LanguageModels, system: str | None = None) -> None:
        """system: the first turn; None takes the model's own ("You are a helpful assistant.")."""
        require_text(SYSTEM if system is None else system)
        self.models = models
        self.messages: list[Message] = [Message("system", SYSTEM if system is None else system)]
        self._read = 0  # messages whose tokens are in the cache
        self._cache = None
        self._cached_tokens = 0
        self._position = 0  # of the next token
        self._pending: list[int] = []  # tokens that were written but not fed back: the end of the last answer

    @torch.inference_mode()
    def say(
        self, text: str, images: Sequence | None = None, *, max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0,
        top_p: float | None = None, top_k: int | None = None, seed: int = 0, on_token: OnToken | None = None,
        min_pixels: int | None = None, max_pixels: int | None = None, pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None, return_ids: bool = False,
    ) -> str | list[int]:  # fmt: skip
        """Adds a user turn and returns the answer.

        Args:
            images: PIL images or float tensors, shown before the text.
            temperature: 0 is deterministic; above, the same seed gives the same answer.
            min_pixels, max_pixels: each image is scaled to this area; more pixels are more tokens (28 x 28 each). A model that
                knows one size only (`image_side`) takes that.
            pixel_values, image_grid_thw: images preprocessed by the caller, in place of `images`; `to_json` can't keep them.
            return_ids: give the generated ids (with the one that ended the answer) instead of text.
        Raises: InputError for bad arguments or when the context is full. The conversation is then, and after anything that
            `on_token` raises, as it was before the call.
        """
        require_text(text)
        if not text.strip():
            raise InputError("the question is empty. Ask something about the image, or give an instruction.")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens!r} is not a positive integer.")
        pick = token_picker(temperature, top_p, top_k, seed)
        message = Message("user", text, some_rgb_images(images), *pixel_budget(min_pixels, max_pixels))
        before = (list(self.messages), self._read, self._cached_tokens, self._position, list(self._pending))
        try:
            self.messages.append(message)
            hidden = self._read_messages(pixel_values, image_grid_thw, room=max_new_tokens)
            ids = self._write(hidden, pick, max_new_tokens, on_token)
            answer = self.models.tokenizer.text(ids)
            kept = ids[:-1] if ids[-1] in self.models.tokenizer.stop_ids else ids
            self.messages.append(Message("assistant", answer, ids=kept))
            self._read = len(self.messages)
        except BaseException:
            self._restore(*before)
            raise
        return ids if return_ids else answer

    def show(
        self, text: str, drawn: Sequence, images: Sequence | None = None, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        """Adds a finished exchange without writing: the user asked for `text` (about `images`), the answer was the pictures `drawn`.

        min_pixels, max_pixels: the size at which later turns see them, as in `say`.
        """
        require_text(text)
        budget = pixel_budget(min_pixels, max_pixels)
        self.messages += [Message("user", text, some_rgb_images(images), *budget), Message("assistant", "", to_rgb_images(drawn), *budget)]

    @property
    def last_image(self) -> Image.Image | None:
        """The newest picture of the conversation, shown or drawn."""
        return next((message.images[-1] for message in reversed(self.messages) if message.images), None)

    def to_json(self) -> str:
        """The conversation with its images (PNG), for `from_json`. The cache is not saved; it is read again."""
        return json.dumps({"format": FORMAT, "messages": [
            {"role": m.role, "text": m.text, "images": [_encode_image(image) for image in m.images],
             "min_pixels": m.min_pixels, "max_pixels": m.max_pixels, "ids": m.ids}
            for m in self.messages
        ]}, ensure_ascii=False)  # fmt: skip

    @classmethod
    def from_json(cls, models: LanguageModels, text: str, **arguments: Any) -> "Chat":
        """Raises InputError if `text` is not what `to_json` wrote."""
        try:
            saved = json.loads(text)
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}")
            messages = [
                Message(m["role"], m["text"], [_decode_image(image) for image in m["images"]],
                        *pixel_budget(m["min_pixels"], m["max_pixels"]), None if m["ids"] is None else [int(i) for i in m["ids"]])
                for m in saved["messages"]
            ]  # fmt: skip
            if any(not 0 <= i < models.tokenizer.vocabulary_size for m in messages for i in m.ids or ()):
                raise ValueError("a token is not in the vocabulary")
            if not messages or messages[0].role != "system" or any(m.role not in ("system", "user", "assistant") for m in messages):
                raise ValueError("roles are not system, user and assistant")
            if not all(isinstance(m.text, str) for m in messages):
                raise ValueError("a turn has no text")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"this is no saved conversation ({error}). Give what `to_json` or /save wrote.") from error
        chat = cls(models, messages[0].text, **arguments)
        chat.messages = messages
        return chat

    def _restore(self, messages: list[Message], read: int, cached: int, position: int, pending: list[int]) -> None:
        self.messages, self._read, self._cached_tokens, self._position, self._pending = messages, read, cached, position, pending
        if self._cache is not None and (surplus := self._cache.get_seq_length() - cached) > 0:
            self._cache.crop(-surplus)

    def _read_messages(self, pixel_values: Tensor | None, image_grid_thw: Tensor | None, *, room: int) -> Tensor:
        """Feeds everything that the cache doesn't hold, and the start of the answer -> state of the last token (1, H)."""
        tokenizer = self.models.tokenizer
        parts = [_Part(self._pending)]
        for message in self.messages[self._read :]:
            if message.ids is not None:  # an answer of the model: its own tokens, which its text may not give back
                parts += [_Part(tokenizer.ids(open_turn("assistant"))), _Part([*message.ids, *tokenizer.ids(CLOSE_TURN)])]
                continue
            if pixel_values is not None and message is self.messages[-1]:
                images = (pixel_values, image_grid_thw)
            else:
                low, high = (self.models.image_side**2,) * 2 if self.models.image_side else (message.min_pixels, message.max_pixels)
                images = qwen_pixel_values(message.images, min_pixels=low, max_pixels=high) if message.images else None
            grids = merged_grids(images[1]) if images else []
            ids = tokenizer.ids(turn(message.role, message.text, [t * h * w for t, h, w in grids]))
            parts.append(_Part(ids, grids, images))
        parts.append(_Part(tokenizer.ids(open_turn())))

        total = self._cached_tokens + sum(len(part.ids) for part in parts)
        longest = self.models.context_tokens
        if total + room > longest:
            raise InputError(f"the conversation has {total} tokens and {room} more may be written, but the context holds {longest}. "
                             "Start a new one, give fewer or smaller images (max_pixels), or lower max_new_tokens.")
        positions = []
        for part in parts:
            pad = tokenizer.image_pad_id if part.images else None  # in an answer it is a token like any other
            position, self._position = multimodal_positions(part.ids, pad, part.grids, self._position)
            positions.append(position)
        embedded = [self._embed(part) for part in parts if part.ids]
        return self._feed(torch.cat(embedded), torch.cat(positions, dim=1))

    def _embed(self, part: "_Part") -> Tensor:
        features = image_features(self.models, *part.images) if part.images else None
        return self.models.backbone.embed(part.ids, device=self.models.device, dtype=self.models.dtype, image_features=features,
                                          image_token_id=self.models.tokenizer.image_pad_id)  # fmt: skip

    def _feed(self, embedded: Tensor, positions: Tensor) -> Tensor:
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache()
        states = self.models.backbone.decode(embedded[None], positions[:, None].to(self.models.device), self._cache)
        self._cached_tokens += len(embedded)
        self._pending = []
        return states[:, -1]

    def _write(self, hidden: Tensor, pick: PickToken, max_new_tokens: int, on_token: OnToken | None) -> list[int]:
        tokenizer, head = self.models.tokenizer, self.models.output_head
        ids: list[int] = []
        unshown: list[int] = []  # whose bytes don't end a character yet
        while True:
            token = pick(head(hidden)[0])
            ids.append(token)
            stopped = token in tokenizer.stop_ids
            if on_token is not None and not stopped:
                unshown.append(token)
                piece = tokenizer.text(unshown)
                if piece.endswith(INCOMPLETE):
                    piece = ""
                else:
                    unshown.clear()
                stopped = on_token(piece) is False
            if stopped or len(ids) == max_new_tokens:
                break
            hidden = self._feed(self._embed(_Part([token])), torch.full((3, 1), self._position))
            self._position += 1
        kept = [] if ids[-1] in tokenizer.stop_ids else [ids[-1]]
        self._pending = [*kept, *tokenizer.ids(CLOSE_TURN)]
        return ids


@dataclass(frozen=True)
class _Part:
    """Tokens that are fed together, and the images among them."""

    ids: list[int]
    grids: list[Grid] = field(default_factory=list)
    images: tuple[Tensor, Tensor] | None = None  # pixel_values, image_grid_thw


def some_rgb_images(images: Sequence | None) -> list[Image.Image]:
    """Like `to_rgb_images`, but nothing, or an empty list, is no image."""
    if images is None or (isinstance(images, Sequence) and not images):
        return []
    return to_rgb_images(images)


def pixel_budget(min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Both limits with the processor's own in place of None. Raises InputError unless 1 <= min_pixels <= max_pixels."""
    low = MIN_PIXELS if min_pixels is None else min_pixels
    high = MAX_PIXELS if max_pixels is None else max_pixels
    if not all(isinstance(limit, int) and not isinstance(limit, bool) for limit in (low, high)) or not 1 <= low <= high:
        raise InputError(f"min_pixels={low!r} and max_pixels={high!r} leave no size: both are whole numbers, 1 <= min <= max.")
    return low, high


def _encode_image(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _decode_image(text: str) -> Image.Image:
    return load_image_bytes(base64.b64decode(text, validate=True), "a picture of the conversation")
