"""Three-axis rotary positions of Qwen2.5-VL (arXiv:2502.13923): text counts on all axes, image cells by row and column."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

Grid = tuple[int, int, int]
"""Cells (frames, rows, columns) of one image after merging."""


def multimodal_positions(
    token_ids: Sequence[int], image_token_id: int | None, grids: Sequence[Grid], start: int = 0
) -> tuple[Tensor, int]:
    """Positions of a sequence (3, N) int64 that continues at `start`, and the position of the token after it.

    An image at running number s gives its cell (r, c) the positions (s, s + r, s + c); the text goes on behind the largest.
    With image_token_id None all tokens are text.
    Raises: InputError if runs of image tokens don't have the sizes of `grids`.
    """
    rows: list[Tensor] = []
    index, position, remaining = 0, start, list(grids)
    while index < len(token_ids):
        if token_ids[index] != image_token_id:
            end = index
            while end < len(token_ids) and token_ids[end] != image_token_id:
                end += 1
            rows.append(torch.arange(position, position + end - index).expand(3, -1))
            position += end - index
            index = end
            continue
        grid = remaining.pop(0) if remaining else None
        cells = grid[0] * grid[1] * grid[2] if grid else 0
        if grid is None or list(token_ids[index : index + cells]) != [image_token_id] * cells:
            raise InputError(f"the image tokens from index {index} don't fit an image of grid {grid}.")
        frame, row, column = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
        rows.append(torch.stack((torch.zeros_like(frame), row, column)).flatten(1) + position)
        position += max(grid[1:])  # a still image spends no time
        index += cells
    if remaining:
        raise InputError(f"{len(remaining)} images have no image tokens in the text.")
    return (torch.cat(rows, dim=1) if rows else torch.zeros(3, 0, dtype=torch.long)), position
