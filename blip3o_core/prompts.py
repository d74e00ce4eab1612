"""Prompt templates and their token ids. Only templates place special tokens; what a user types is always plain text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, InputError

IMAGE_START = "[IMG]"  # closes every prompt of the generation path; the learned queries follow
NULL_PROMPT = " "  # untemplated; the reference's null condition of the second stage
TRAINED_PROMPT_TOKENS = 447  # longer prompts were cut in training: 512 less [IMG] and 64 queries


@dataclass(frozen=True)
class Special:
    """A piece of a template that is one special token."""

    token: str


IM_START, IM_END = Special("<|im_start|>"), Special("<|im_end|>")


def generation_template(caption: str) -> list[Special | str]:
    """The text-to-image turn of the reference; the assistant turn stays open (in training it was closed)."""
    return [
        IM_START, "system\nYou are a helpful assistant.", IM_END, "\n",
        IM_START, f"user\nPlease generate image based on the following caption: {caption}", IM_END, "\n",
        IM_START, "assistant\n",
    ]  # fmt: skip


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

    def ids(self, pieces: Sequence[Special | str]) -> list[int]:
        """Ids of a sequence of special tokens and plain text."""
        result: list[int] = []
        for piece in pieces:
            if isinstance(piece, Special):
                result.append(self.special_id(piece.token))
            else:
                result.extend(self._plain.encode(piece, add_special_tokens=False).ids)
        return result

    def generation_ids(self, prompt: str, *, template: bool = True, max_tokens: int | None = None) -> list[int]:
        """Ids of one text-to-image prompt, closed by `[IMG]`.

        Args:
            template: put the prompt in the frame of the reference; False takes it as raw text.
            max_tokens: the longest the model can take.
        Raises: InputError if the prompt is empty (templated: or only spaces), too long or no valid text.
        """
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is text, not {type(prompt).__name__} ({prompt!r:.60}).")
        if not prompt or (template and not prompt.strip()):
            raise InputError('the prompt is empty. Say what the image should show; the null condition of the decoder is " " '
                             "with template off.")
        try:
            ids = self.ids(generation_template(prompt) if template else [prompt])
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(f"the prompt {prompt!r:.60} holds characters that are no valid Unicode text ({error}).") from error
        if max_tokens is not None and len(ids) > max_tokens:
            raise InputError(f"the prompt {prompt[:40]!r}... has {len(ids)} tokens with its frame; this model takes {max_tokens} "
                             f"and was trained on {TRAINED_PROMPT_TOKENS}. Shorten it.")
        return [*ids, self.image_start_id]
