"""Sample pictures of a run: the same prompts and noise each time, drawn with the weights of the moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..files import require_writable, whole_file
from ..images import load_image
from ..pipelines.blip3o import Blip3oPipeline
from ..prompts import NULL_PROMPT
from .config import SampleOptions
from .frozen import FrozenNetworks
from .model import TrainingModel


@dataclass(frozen=True)
class Prompts:
    """What is drawn. If the language side is frozen, `states` (n, Q, H) and `null_state` (1, Q, H) are kept."""

    options: SampleOptions
    images: tuple[Image.Image | None, ...]
    states: Tensor | None
    null_state: Tensor | None


def open_prompts(options: SampleOptions) -> tuple[Image.Image | None, ...]:
    """Pictures to edit. Raises InputError for one that can't be read."""
    return tuple(load_image(name) if name else None for name in options.images or [""] * len(options.prompts))


def require_drawable(options: SampleOptions, factor: int) -> None:
    """Raises ConfigError for a size that the decoder can't draw."""
    for name in ("width", "height"):
        if getattr(options, name) % factor:
            raise ConfigError(f"samples.{name} = {getattr(options, name)} is not a multiple of {factor}.")


def pipeline_of(frozen: FrozenNetworks, model: TrainingModel | None) -> Blip3oPipeline:
    """A pipeline around the networks that are in memory; what it lacks it loads itself, and frees when it goes."""
    sources = frozen.sources
    backbone = model.backbone if model is not None else None
    if backbone is None and "backbone" in frozen.loaded:
        backbone = frozen.backbone
    return Blip3oPipeline(sources.checkpoint, sources.decoder, device=frozen.device, dtype=frozen.dtype,
                          vision_source=sources.vision_encoder, backbone=backbone, dit=model.dit if model is not None else None,
                          vision_tower=model.vision_tower if model is not None else None)  # fmt: skip


def encode_fixed_prompts(
    options: SampleOptions, images: Sequence[Image.Image | None], frozen: FrozenNetworks, *, cacheable: bool
) -> Prompts:
    """Query states of the sample prompts, computed once if the language side is frozen."""
    if not cacheable:
        return Prompts(options, tuple(images), None, None)
    frozen.backbone  # noqa: B018 -- loaded once, for this and for what follows
    pipe = pipeline_of(frozen, None)
    return Prompts(options, tuple(images), _states(pipe, options, images).cpu(), pipe.encode_prompt([NULL_PROMPT], template=False).cpu())


def _states(pipe: Blip3oPipeline, options: SampleOptions, images: Sequence[Image.Image | None]) -> Tensor:
    return torch.cat([pipe.encode_prompt([prompt], images=None if image is None else [[image]])
                      for prompt, image in zip(options.prompts, images, strict=True)])  # fmt: skip


def draw(prompts: Prompts, model: TrainingModel, frozen: FrozenNetworks) -> list[Image.Image]:
    """One picture per prompt. Decoder and, where needed, backbone are loaded for this and freed again."""
    options = prompts.options
    model.set_training(False)
    pipe = pipeline_of(frozen, model)
    with torch.autocast(frozen.device.type, dtype=frozen.dtype, enabled=frozen.dtype != torch.float32):
        states = prompts.states if prompts.states is not None else _states(pipe, options, prompts.images)
        pictures = []
        negative = _negative(prompts, pipe) if options.decoder_guidance_scale > 1 else None
        for index in range(len(options.prompts)):  # one by one: memory of a training run is scarce
            z = pipe.sample_embeddings(states[index : index + 1], steps=options.steps, guidance_scale=options.guidance_scale,
                                       seeds=[options.seed])  # fmt: skip
            pictures += pipe.decode_embeddings(z, negative=negative, steps=options.decoder_steps, width=options.width,
                                               guidance_scale=options.decoder_guidance_scale, height=options.height,
                                               seeds=[options.seed])  # fmt: skip
    model.set_training(True)
    return pictures


def save_sheet(folder: Path, step: int, image: Image.Image) -> Path:
    """samples/step_00000200.png in the folder of the run. Raises OutputError if it can't be written."""
    path = folder / "samples" / f"step_{step:08d}.png"
    require_writable([path.parent], path.parent)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def _negative(prompts: Prompts, pipe: Blip3oPipeline) -> Tensor:
    state = prompts.null_state if prompts.null_state is not None else pipe.encode_prompt([NULL_PROMPT], template=False)
    return pipe.sample_embeddings(state, seeds=[0])
