"""What headless and hosted backbones share: the networks that read and write, and prompts with images -> query states."""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from ..images import qwen_pixel_values
from ..models.qwen2_5_vl import Backbone, VisionTower
from ..models.qwen_positions import Grid, multimodal_positions
from ..prompts import PromptTokenizer

PUBLISHED_IMAGE_SIDE = 448  # of an image before an instruction: 256 image tokens
TRAINED_SIZE = "trained"
POSITIONS = ("arange", "mrope")


class LanguageModels(Protocol):
    """Networks are loaded when they are first asked for; `context_tokens`, the longest sequence, is known before."""

    tokenizer: PromptTokenizer
    image_side: int | None  # see Blip3oCheckpoint.image_side
    device: torch.device
    dtype: torch.dtype

    @property
    def context_tokens(self) -> int: ...
    @property
    def backbone(self) -> Backbone: ...
    @property
    def vision_tower(self) -> VisionTower: ...
    @property
    def output_head(self) -> nn.Module: ...


def merged_grids(grid_thw: Tensor | None, merge_size: int = 2) -> list[Grid]:
    """Cells of each image after merging 2 x 2 patches. Raises InputError for pixel_values that came without their grid."""
    if grid_thw is None:
        raise InputError("pixel_values need image_grid_thw, (images, 3): frames, rows and columns of patches of each image.")
    return [(int(t), int(h) // merge_size, int(w) // merge_size) for t, h, w in grid_thw]


def image_features(models: LanguageModels, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Preprocessed images -> (n, H), image after image."""
    if int(grid_thw.prod(dim=1).sum()) != len(pixel_values):
        raise InputError(f"image_grid_thw {grid_thw.tolist()} describes {int(grid_thw.prod(dim=1).sum())} patches, pixel_values "
                         f"holds {len(pixel_values)}.")
    return models.vision_tower(pixel_values.to(models.device, models.dtype), grid_thw.to(models.device))


def encode_prompts(
    models: LanguageModels, prompts: Sequence[str], *, template: bool = True, images: Sequence[Sequence[Image.Image]] | None = None,
    image_size: tuple[int, int] | str | None = TRAINED_SIZE, positions: str = "arange",
    pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, max_tokens: int,
) -> Tensor:  # fmt: skip
    """Prompts, with or without images -> query states (B, Q, H).

    Args:
        images: for each prompt a list of images; all prompts are read in one pass.
        image_size: (width, height) that images are brought to before the processor; "trained" takes the model's (448 x 448 if it
            was published); None keeps their own.
        positions: "arange" counts all tokens as the reference does, also for images; "mrope" gives image cells rows and columns.
        pixel_values, image_grid_thw: images preprocessed by the caller; the pads are in the (trusted) text already.
    Raises: InputError, before a network runs.
    """
    if positions not in POSITIONS:
        raise InputError(f"positions {positions!r} is unknown. Use one of {', '.join(POSITIONS)}.")
    if images is not None and len(images) != len(prompts):
        raise InputError(f"{len(images)} lists of images for {len(prompts)} prompts; pass one list per prompt, empty for none.")
    tokenizer = models.tokenizer
    if pixel_values is not None:
        if images is not None or template:
            raise InputError("pixel_values come with a finished text: pass template=False and no images.")
        ids = [[*tokenizer.trusted_ids(prompt), tokenizer.image_start_id] for prompt in prompts]
        grids = merged_grids(image_grid_thw)
    else:
        flat = [image for row in images or [] for image in row]
        if flat:
            side = models.image_side or PUBLISHED_IMAGE_SIDE
            pixel_values, image_grid_thw = qwen_pixel_values(flat, size=(side, side) if image_size == TRAINED_SIZE else image_size)
        grids = merged_grids(image_grid_thw) if flat else []
        remaining = iter(grids)
        ids = []
        for index, prompt in enumerate(prompts):
            counts = [t * h * w for t, h, w in (next(remaining) for _ in (images[index] if images is not None else ()))]
            ids.append(tokenizer.generation_ids(prompt, template=template, image_tokens=counts, max_tokens=max_tokens))

    backbone = models.backbone
    features = None if pixel_values is None else image_features(models, pixel_values, image_grid_thw)
    rows, row_positions, taken, grid_index = [], [], 0, 0
    for row in ids:
        pads = row.count(tokenizer.image_pad_id)
        first, cells = grid_index, 0
        while cells < pads and grid_index < len(grids):
            cells += grids[grid_index][0] * grids[grid_index][1] * grids[grid_index][2]
            grid_index += 1
        own = None if features is None else features[taken : taken + pads]
        taken += pads
        rows.append(backbone.embed(row, device=models.device, dtype=models.dtype, image_features=own,
                                   image_token_id=tokenizer.image_pad_id))  # fmt: skip
        if positions == "mrope":
            text, following = multimodal_positions(row, tokenizer.image_pad_id, grids[first:grid_index])
            queries = torch.arange(following, following + backbone.num_queries).expand(3, -1)
            row_positions.append(torch.cat((text, queries), dim=1).to(models.device))
    if features is not None and taken != len(features):
        raise InputError(f"the texts have {taken} image tokens, the images give {len(features)}.")
    return backbone(rows, row_positions or None)
