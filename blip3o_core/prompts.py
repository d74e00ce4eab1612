"""Prompt templates and their token ids. Only templates place special tokens; what a user types is always plain text."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .errors import CheckpointError, InputError

IMAGE_START = "[IMG]"  # closes every prompt of the generation path; the learned queries follow
SYSTEM = "You are a helpful assistant."
RECONSTRUCT_INSTRUCTION = "\nPlease reconstruct the given image."  # of the reference, with the line feed behind the image
NULL_PROMPT = " "  # untemplated; the reference's null condition of the second stage
TRAINED_PROMPT_TOKENS = 447  # longer prompts were cut in training: 512 less [IMG] and 64 queries


@dataclass(frozen=True)
class Special:
    """A piece of a template that is one special token."""

    token: str


Pieces = list[Special | str]

IM_START, IM_END, END_OF_TEXT = Special("<|im_start|>"), Special("<|im_end|>"), Special("<|endoftext|>")
CLOSE_TURN: Pieces = [IM_END, "\n"]
VISION_START, IMAGE_PAD, VISION_END = Special("<|vision_start|>"), Special("<|image_pad|>"), Special("<|vision_end|>")


def vision_blocks(image_tokens: Sequence[int]) -> Pieces:
    """One block per image, each with as many pads as the image has features."""
    return [piece for count in image_tokens for piece in (VISION_START, *[IMAGE_PAD] * count, VISION_END)]


def turn(role: str, text: str, image_tokens: Sequence[int] = ()) -> Pieces:
    """One closed turn of a conversation; images stand before the text."""
    return [IM_START, f"{role}\n", *vision_blocks(image_tokens), text, *CLOSE_TURN]


def open_turn(role: str = "assistant") -> Pieces:
    """The start of the turn that the model writes."""
    return [IM_START, f"{role}\n"]


def generation_template(caption: str, *, closed: bool = False) -> Pieces:
    """The text-to-image turn of the reference; the assistant turn stays open, or is closed as when the reference was trained."""
    request = f"Please generate image based on the following caption: {caption}"
    return [*turn("system", SYSTEM), *turn("user", request), *open_turn(), *(CLOSE_TURN if closed else ())]


def edit_template(instruction: str, image_tokens: Sequence[int], *, closed: bool = False) -> Pieces:
    """Image-conditioned generation: the same frame with images and a free instruction."""
    return [*turn("system", SYSTEM), *turn("user", instruction, image_tokens), *open_turn(), *(CLOSE_TURN if closed else ())]


class PromptTokenizer:
    """Turns template pieces into ids with the checkpoint's own byte-level BPE.

    User text is tokenised without the table of added tokens, so a typed `<|im_end|>` or `[IMG]` becomes the ids of its
    letters and can't end a turn or start an image. Templated prompts get exactly the ids of the reference.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if `folder` holds no tokenizer, or one without BLIP3-o's special tokens."""
        import tokenizers
        from transformers import Qwen2TokenizerFast

        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(f"{folder}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt). "
                                  "Download the small files of the model repository too.")
        try:
            self._full = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
            description = json.loads(self._full.backend_tokenizer.to_str())
            description["added_tokens"] = []
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # tokenizers raises bare Exception for every damaged file
            raise CheckpointError(f"{folder}: the tokenizer files are damaged ({error}). Download them again.") from error
        self.image_start_id = self.special_id(IMAGE_START, folder)
        for special in (IM_START, IM_END):
            self.special_id(special.token, folder)

    def special_id(self, token: str, folder: Path | str = "the tokenizer") -> int:
        """The id of a special token; raises CheckpointError if the tokenizer has none."""
        token_id = self._full.get_added_vocab().get(token)
        if token_id is None:
            raise CheckpointError(f"{folder}: the tokenizer has no token {token}. It belongs to another model, "
                                  "probably the base Qwen2.5-VL: take the tokenizer files from the BLIP3-o repository.")
        return token_id

    @cached_property
    def vocabulary_size(self) -> int:
        """Ordinary and added tokens."""
        return len(self._full)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends a written turn."""
        return frozenset(self.special_id(special.token) for special in (IM_END, END_OF_TEXT))

    @cached_property
    def image_pad_id(self) -> int:
        """The id whose rows image features replace."""
        return self.special_id(IMAGE_PAD.token)

    def ids(self, pieces: Sequence[Special | str]) -> list[int]:
        """Ids of a sequence of special tokens and plain text. Raises InputError for text that is not valid Unicode."""
        result: list[int] = []
        for is_special, group in itertools.groupby(pieces, lambda piece: isinstance(piece, Special)):
            if is_special:
                result.extend(self.special_id(piece.token) for piece in group)
            else:  # neighbouring text is one text: merges cross the seam, as in a prompt written as one string
                text = "".join(group)
                try:
                    result.extend(self._plain.encode(text, add_special_tokens=False).ids)
                except (UnicodeEncodeError, TypeError) as error:
                    raise InputError(f"the text {text!r:.80} holds characters that are no valid Unicode ({error}).") from error
        return result

    def trusted_ids(self, text: str) -> list[int]:
        """Ids of text in which special tokens count: for callers that build whole prompts themselves."""
        return self._full(text, add_special_tokens=False).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """Written text of generated ids; special tokens are left out."""
        return self._full.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def generation_ids(
        self, prompt: str, *, template: bool = True, image_tokens: Sequence[int] = (), max_tokens: int | None = None
    ) -> list[int]:
        """Ids of one prompt of the generation path, closed by `[IMG]`.

        Args:
            template: put the prompt in the frame of the reference; False takes it as raw text.
            image_tokens: features of each image before the prompt, which then is an instruction.
            max_tokens: the longest the model can take.
        Raises: InputError if the prompt is empty (templated: or only spaces), too long or no valid text.
        """
        require_text(prompt)
        if not prompt or (template and not prompt.strip()):
            raise InputError('the prompt is empty. Say what the image should show; the null condition of the decoder is " " '
                             "with template off.")
        if not template:
            pieces = [*vision_blocks(image_tokens), prompt]
        else:
            pieces = edit_template(prompt, image_tokens) if image_tokens else generation_template(prompt)
        ids = self.ids(pieces)
        if max_tokens is not None and len(ids) > max_tokens:
            raise InputError(f"the prompt {prompt[:40]!r}... has {len(ids)} tokens with its frame; this model takes {max_tokens} "
                             f"and was trained on {TRAINED_PROMPT_TOKENS}. Shorten it or give fewer images.")
        return [*ids, self.image_start_id]

    def training_ids(self, prompt: str, *, image_tokens: Sequence[int] = (), closed: bool = False) -> list[int]:
        """Ids of a training prompt, closed by `[IMG]`: an empty one is allowed (caption dropout), a long one is cut as in the reference.

        Args:
            image_tokens: features of each image before the prompt, which then is an instruction.
            closed: the published training form, in which the assistant turn was ended before `[IMG]`.
        """
        template = edit_template(prompt, image_tokens, closed=closed) if image_tokens else generation_template(prompt, closed=closed)
        limit = TRAINED_PROMPT_TOKENS + sum(count + 2 for count in image_tokens[1:])  # the reference knows one image
        return [*self.ids(template)[:limit], self.image_start_id]

    def conversation_ids(self, turns: Sequence[tuple[str, str]], image_tokens: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them an assistant has to learn to write: its answers with `<|im_end|>`.

        Args:
            turns: (role, text); a system turn comes first or is added. image_tokens: features of each image, in the first user turn.
        """
        turns = list(turns) if turns and turns[0][0] == "system" else [("system", SYSTEM), *turns]
        first_user = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
        ids: list[int] = []
        learned: list[bool] = []
        for index, (role, text) in enumerate(turns):
            if role == "assistant":  # tokenised apart from the role, as when the model writes it
                parts = [(self.ids(open_turn()), False), (self.ids([text, IM_END]), True), (self.ids(["\n"]), False)]
            else:
                parts = [(self.ids(turn(role, text, image_tokens if index == first_user else ())), False)]
            for part, is_learned in parts:
                ids += part
                learned += [is_learned] * len(part)
        return ids, learned


def require_text(prompt: str) -> None:
    """Raises InputError for anything that is not a string."""
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is text, not {type(prompt).__name__} ({prompt!r:.60}).")
