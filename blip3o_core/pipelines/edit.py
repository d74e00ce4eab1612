"""Pictures from pictures: edits, chains of edits, variations, and a conversation that draws."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import InputError
from ..images import to_rgb_images
from ..prompts import RECONSTRUCT_INSTRUCTION, require_text
from ..sampling.flow_matching import flow_sigmas
from .chat import Chat, pixel_budget, some_rgb_images
from .language import TRAINED_SIZE

if TYPE_CHECKING:
    from .blip3o import Blip3oPipeline


def edit(
    pipe: "Blip3oPipeline", images: Sequence, instructions: Sequence[str | Sequence[str]] | str, *, seeds: Sequence[int] | None = None,
    strength: float = 1.0, steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None,
    schedule: str | None = None, guidance_interval: tuple[float, float] = (0.0, 1.0), decoder_steps: int | None = None,
    decoder_guidance_scale: float | None = None, negative=None, width: int | None = None,
    height: int | None = None, positions: str = "arange", image_size: tuple[int, int] | str | None = TRAINED_SIZE, on_step=None,
) -> list[Image.Image]:  # fmt: skip
    """Image-conditioned generation: the backbone sees the picture and reads the instruction.

    Args:
        images: one entry per result: a picture, or a list of pictures that the instruction may refer to (the first is changed).
        instructions: one per entry; a list of texts is a chain, each applied to the result of the one before.
        seeds: one per entry; every link of a chain uses it.
        strength: 1 draws anew from what was understood; below, the embedding of the (first) picture is noised so far and
            sampled from there, which keeps more of it. Needs the EVA-CLIP tower.
        Settings that are None are those of the checkpoint.
    Raises: InputError for bad arguments, before anything is drawn.
    """
    instructions = [instructions] if isinstance(instructions, str) else list(instructions)
    chains = [[item] if isinstance(item, str) else list(item) for item in instructions]
    images = [images] if isinstance(images, Image.Image) else list(images)
    sources = [to_rgb_images(image) for image in images]
    seeds = list(range(len(sources))) if seeds is None else list(seeds)
    if not sources or not len(sources) == len(chains) == len(seeds):
        raise InputError(f"{len(sources)} images, {len(chains)} instructions and {len(seeds)} seeds; pass as many of each.")
    for chain in chains:
        if not chain:
            raise InputError("a chain of edits is empty. Give at least one instruction.")
        for instruction in chain:
            require_text(instruction)
    flat = [instruction for chain in chains for instruction in chain]
    decoding = dict(decoder_steps=decoder_steps, decoder_guidance_scale=decoder_guidance_scale, width=width, height=height)
    pipe.check_generate(flat, seeds=seeds, steps=steps, guidance_scale=guidance_scale, solver=solver, schedule=schedule,
                        guidance_interval=guidance_interval, negative=negative, **decoding)  # fmt: skip

    _, steps, schedule = pipe.sampler(solver, steps, schedule)
    flow_sigmas(steps, strength=strength, schedule=schedule)
    if strength < 1:
        pipe.require_vision_encoder()

    results = [row[0] for row in sources]
    for link in range(max(map(len, chains))):
        todo = [index for index, chain in enumerate(chains) if link < len(chain)]
        q = pipe.encode_prompt([chains[index][link] for index in todo], images=[[results[index], *sources[index][1:]] for index in todo],
                               image_size=image_size, positions=positions)  # fmt: skip
        own_seeds = [seeds[index] for index in todo]
        init = None if strength == 1 else pipe.embed_image([results[index] for index in todo])
        z = pipe.sample_embeddings(q, steps=steps, guidance_scale=guidance_scale, solver=solver, schedule=schedule, strength=strength,
                                   guidance_interval=guidance_interval, seeds=own_seeds, init=init, on_step=on_step)  # fmt: skip
        away = pipe.sampled_negative(negative, decoder_guidance_scale, solver, on_step)
        drawn = pipe.decode_embeddings(z, negative=away, steps=decoder_steps, guidance_scale=decoder_guidance_scale, width=width,
                                       height=height, seeds=own_seeds, on_step=on_step)  # fmt: skip
        for index, picture in zip(todo, drawn, strict=True):
            results[index] = picture
    return results


def vary(pipe: "Blip3oPipeline", images: Sequence, *, seeds: Sequence[int], strength: float = 0.6, **settings: Any) -> list[Image.Image]:
    """One variation of each picture per seed, picture by picture: its embedding noised by `strength` and sampled again.

    The prompt is the reference's "reconstruct the given image", so that the result stays what the backbone saw.
    """
    pictures = to_rgb_images(images)
    repeated = [picture for picture in pictures for _ in seeds]
    return edit(pipe, repeated, [RECONSTRUCT_INSTRUCTION] * len(repeated), seeds=list(seeds) * len(pictures), strength=strength, **settings)


class DrawingChat(Chat):
    """A conversation with a pipeline: turns ask, and turns draw; drawn pictures are part of what later turns see."""

    models: "Blip3oPipeline"

    def draw(
        self, prompt: str, seeds: Sequence[int] = (0,), *, images: Sequence | None = None, strength: float = 1.0,
        min_pixels: int | None = None, max_pixels: int | None = None, **settings: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Draws one picture per seed: an edit of `images`, of the newest picture of the conversation, or from the prompt alone.

        The exchange becomes part of the conversation; it is unchanged if drawing fails or is cancelled.

        Args:
            images: pictures that the prompt is about; the first is changed.
            min_pixels, max_pixels: the size at which later turns see the pictures, as in `say`.
            settings: as in `edit` or, without a picture, `Blip3oPipeline.generate`.
        """
        require_text(prompt)
        pixel_budget(min_pixels, max_pixels)
        given = some_rgb_images(images)
        sources = given or ([self.last_image] if self.last_image is not None else [])
        if sources:
            pictures = edit(self.models, [sources] * len(seeds), [prompt] * len(seeds), seeds=list(seeds), strength=strength, **settings)
        else:
            pictures = self.models.generate([prompt] * len(seeds), seeds=list(seeds), **settings)
        self.show(prompt, pictures, given, min_pixels=min_pixels, max_pixels=max_pixels)
        return pictures
