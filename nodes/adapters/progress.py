"""The node's progress bar and the host's cancel, as callbacks of the core."""

import comfy.model_management as model_management
import comfy.utils


class TokenProgress:
    """An `on_token` callback: one tick per piece of text; cancels between two tokens."""

    def __init__(self, max_new_tokens: int) -> None:
        self._bar = comfy.utils.ProgressBar(max_new_tokens)
        self._total = max_new_tokens
        self._done = 0

    def __call__(self, piece: str) -> None:
        model_management.throw_exception_if_processing_interrupted()
        self._done = min(self._done + 1, self._total)
        self._bar.update_absolute(self._done)


class LoadProgress:
    """An `on_load` callback: percent of the bytes; cancels between two tensors."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(100)

    def __call__(self, component: str, done: int, total: int) -> None:
        model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(100 * done // total)
