"""What is measured: every stage of a pipeline as it runs, beside the plain way to do the same.

Plain is: one picture at a time, nothing kept from step to step, both branches of guidance in full, no key-value cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..models.eva_clip import EMBEDDING_GRID
from ..pipelines.blip3o import Blip3oPipeline
from ..sampling.flow_matching import NUM_TRAIN_TIMESTEPS, flow_sigmas, sample_euler, sample_heun, truncate_timestep
from ..sampling.noise import seeded_noise
from .timing import Measurement, alternating, compared

PLAIN, OWN = "plain", "blip3o"
PROMPTS = ("a red circle left of a blue square", "three green stars on a white background", "a large yellow ring in the centre",
           "a purple cross and an orange triangle")  # fmt: skip
QUESTION = "Which objects are in the picture, and where?"
GUIDANCE_SCALE = 3.0
SAMPLERS = (("dpmpp_2m", 8), ("dpmpp_2m", 10), ("dpmpp_2m", 12), ("dpmpp_2m", 20), ("ab2", 20), ("heun", 6))
"""(solver, steps) that are compared with Euler."""
TOKENS = 16  # of an answer

OnRound = Callable[[str, int, int], None]
"""(what is measured, rounds done, rounds in all)."""


@dataclass(frozen=True)
class BenchOptions:
    """batches: pictures or prompts at once. steps: of the embedding. reference_steps: of the solution that errors are measured against;
    0 measures none."""

    rounds: int = 5
    warmup: int = 1
    batches: Sequence[int] = (1, 4)
    steps: int = 30
    reference_steps: int = 0


def measure(
    open_pipeline: Callable[[], Blip3oPipeline], stages: Sequence[str], options: BenchOptions, on_round: OnRound | None = None
) -> Iterator[Measurement]:
    """Measures stage by stage; networks are loaded before their stage is timed, and kept for the next ones.

    open_pipeline: a new pipeline, with nothing loaded.
    """
    if "load" in stages:
        yield from _load(open_pipeline)
    pipe = open_pipeline()
    makers = {"encode": _encode, "dit-step": _dit_step, "dit-sample": _dit_sample, "decode-step": _decode_step, "decode": _decode,
              "ask-prefill": _ask_prefill, "ask-tokens": _ask_tokens}  # fmt: skip
    with torch.inference_mode():
        for stage in stages:
            if stage in makers:
                yield from makers[stage](_Bench(pipe, options, on_round))


@dataclass(frozen=True)
class _Bench:
    pipe: Blip3oPipeline
    options: BenchOptions
    on_round: OnRound | None

    def run(self, name: str, variants: dict[str, Callable[[], object]]) -> dict[str, tuple[float, ...]]:
        watch = None if self.on_round is None else lambda done, total: self.on_round(name, done, total)
        return alternating(variants, rounds=self.options.rounds, warmup=self.options.warmup, device=self.pipe.device, on_round=watch)

    def query_states(self, batch: int) -> Tensor:
        return self.pipe.encode_prompt(_prompts(batch))

    def noise(self, batch: int) -> Tensor:
        shape = (self.pipe.embedding_width, EMBEDDING_GRID, EMBEDDING_GRID)
        return seeded_noise(range(batch), shape).to(self.pipe.device)


def _prompts(batch: int) -> list[str]:
    return [PROMPTS[index % len(PROMPTS)] for index in range(batch)]


def _load(open_pipeline: Callable[[], Blip3oPipeline]) -> Iterator[Measurement]:
    """Once each: a second time the files come from the system's cache."""
    for part in ("backbone", "dit", "decoder"):
        pipe = open_pipeline()
        totals: dict[str, int] = {}  # a decoder is several files
        pipe._on_load = lambda component, done, total, totals=totals: totals.update({component: total})
        seconds = alternating({OWN: lambda pipe=pipe, part=part: getattr(pipe, part)}, rounds=1, warmup=0, device=pipe.device)
        yield from compared(f"load {part}", seconds, batch=1, unit="file", nbytes={OWN: sum(totals.values())})


def _encode(bench: _Bench) -> Iterator[Measurement]:
    pipe = bench.pipe
    for batch in bench.options.batches:
        prompts = _prompts(batch)
        seconds = bench.run(f"encode, {batch}", {
            PLAIN: lambda prompts=prompts: [pipe.encode_prompt([prompt]) for prompt in prompts],
            OWN: lambda prompts=prompts: pipe.encode_prompt(prompts),
        })  # fmt: skip
        yield from compared("encode", seconds, batch=batch, unit="prompt", items=batch, plain=PLAIN)


def plain_velocity(pipe: Blip3oPipeline, q: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """As the reference computes it: condition and null in one batch, everything anew in every step."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        doubled = torch.cat((x, x)).to(pipe.dtype)
        timestep = truncate_timestep(sigma * NUM_TRAIN_TIMESTEPS).to(pipe.device).expand(len(doubled))
        null, condition = pipe.dit(doubled, timestep, torch.cat((torch.zeros_like(q), q))).float().chunk(2)
        return null + GUIDANCE_SCALE * (condition - null)

    return velocity


def _dit_step(bench: _Bench) -> Iterator[Measurement]:
    pipe = bench.pipe
    for batch in bench.options.batches:
        q, noise, sigma = bench.query_states(batch), bench.noise(batch), torch.tensor(0.5)
        plain, own = plain_velocity(pipe, q), pipe._guided_velocity(q, GUIDANCE_SCALE, True)
        variants = {PLAIN: partial(plain, noise, sigma), OWN: partial(own, noise, sigma)}
        seconds = bench.run(f"DiT step, {batch}", variants)
        yield from compared("DiT step", seconds, batch=batch, unit="picture", items=batch, plain=PLAIN)


def _dit_sample(bench: _Bench) -> Iterator[Measurement]:
    pipe, options = bench.pipe, bench.options
    for batch in options.batches:
        q, noise = bench.query_states(batch), bench.noise(batch)

        samplers = {f"{solver} {steps}": (solver, steps) for solver, steps in SAMPLERS}
        samplers = {f"euler {options.steps}": ("euler", options.steps), **samplers}
        variants = {f"{PLAIN} euler {options.steps}": partial(_plain_sample, pipe, q, noise, options.steps)}
        variants |= {name: partial(pipe.sample_embeddings, q, steps=steps, guidance_scale=GUIDANCE_SCALE, solver=solver,
                                   noise=noise) for name, (solver, steps) in samplers.items()}  # fmt: skip
        seconds = bench.run(f"DiT sample, {batch}", variants)
        steps = dict.fromkeys(variants, options.steps) | {name: sampler[1] for name, sampler in samplers.items()}
        errors: dict[str, float] = {}
        if options.reference_steps:
            exact = sample_heun(pipe._guided_velocity(q, GUIDANCE_SCALE, False), noise, flow_sigmas(options.reference_steps // 2))
            errors = {name: _relative_error(run(), exact) for name, run in variants.items()}
        yield from compared("DiT sample", seconds, batch=batch, unit="picture", items=batch, plain=f"{PLAIN} euler {options.steps}",
                            steps=steps, error=errors)  # fmt: skip


def _plain_sample(pipe: Blip3oPipeline, q: Tensor, noise: Tensor, steps: int) -> Tensor:
    rows = zip(q.split(1), noise.split(1), strict=True)
    return torch.cat([sample_euler(plain_velocity(pipe, own), start, flow_sigmas(steps)) for own, start in rows])


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Mean over pictures of |found - exact| / |exact|."""
    return ((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean().item()


def _decode_step(bench: _Bench) -> Iterator[Measurement]:
    """Both branches of guidance one after the other, and in one batch."""
    pipe = bench.pipe
    width, height = pipe.drawing.width, pipe.drawing.height
    for batch in bench.options.batches:
        tokens, noise = _embeddings(pipe, batch), _latent_noise(pipe, batch)
        sizes = {"steps": 1, "width": width, "height": height}
        seconds = bench.run(f"decode step, {batch}", {
            PLAIN: lambda tokens=tokens, noise=noise, sizes=sizes: [
                pipe.decoder.sample_latents(tokens, None, noise, guidance_scale=1.0, **sizes) for _ in range(2)],
            OWN: lambda tokens=tokens, noise=noise, sizes=sizes: pipe.decoder.sample_latents(
                tokens, torch.zeros_like(tokens), noise, guidance_scale=GUIDANCE_SCALE, **sizes),
        })  # fmt: skip
        yield from compared("decode step", seconds, batch=batch, unit="picture", items=batch, plain=PLAIN)


def _decode(bench: _Bench) -> Iterator[Measurement]:
    """The model's own steps and guidance, with the autoencoder: one picture at a time, and all at once."""
    pipe = bench.pipe
    for batch in bench.options.batches:
        tokens = _embeddings(pipe, batch)
        seconds = bench.run(f"decode, {batch}", {
            PLAIN: lambda tokens=tokens: [pipe.decode_embeddings(row[None], negative="zeros") for row in tokens],
            OWN: lambda tokens=tokens: pipe.decode_embeddings(tokens, negative="zeros"),
        })  # fmt: skip
        yield from compared("decode", seconds, batch=batch, unit="picture", items=batch, plain=PLAIN,
                            steps=dict.fromkeys(seconds, pipe.drawing.decoder_steps))  # fmt: skip


def _embeddings(pipe: Blip3oPipeline, batch: int) -> Tensor:
    """Tokens (B, 64, C) of no picture in particular."""
    return seeded_noise(range(batch), (EMBEDDING_GRID**2, pipe.decoder_checkpoint.embedding_width)).to(pipe.device)


def _latent_noise(pipe: Blip3oPipeline, batch: int) -> Tensor:
    checkpoint = pipe.decoder_checkpoint
    shape = (checkpoint.latent_channels, pipe.drawing.height // checkpoint.factor, pipe.drawing.width // checkpoint.factor)
    return seeded_noise(range(batch), shape).to(pipe.device)


def _question(pipe: Blip3oPipeline) -> dict:
    side = pipe.image_side or 448
    return {"question": QUESTION, "images": [Image.new("RGB", (side, side), (70, 130, 180))], "min_pixels": side**2, "max_pixels": side**2}


def _ask_prefill(bench: _Bench) -> Iterator[Measurement]:
    """A question about a picture up to the first token."""
    question = _question(bench.pipe)
    seconds = bench.run("ask, first token", {OWN: lambda: bench.pipe.ask(**question, max_new_tokens=1)})
    yield from compared("ask prefill", seconds, batch=1, unit="question")


def _ask_tokens(bench: _Bench) -> Iterator[Measurement]:
    """Tokens behind a text: with the key-value cache, and by reading everything anew for each of them."""
    from transformers import DynamicCache

    pipe = bench.pipe
    ids = pipe.tokenizer.ids([QUESTION])
    embedded = pipe.backbone.embed([*ids, *ids[:1] * TOKENS], device=pipe.device, dtype=pipe.dtype)[None]
    head, start = pipe.output_head, len(ids)

    def positions(first: int, last: int) -> Tensor:
        return torch.arange(first, last, device=pipe.device).expand(3, 1, -1)

    def plain() -> None:
        for end in range(start, start + TOKENS):
            head(pipe.backbone.decode(embedded[:, :end], positions(0, end))[:, -1])

    def own() -> None:
        cache, done = DynamicCache(), 0
        for end in range(start, start + TOKENS):
            head(pipe.backbone.decode(embedded[:, done:end], positions(done, end), cache)[:, -1])
            done = end

    seconds = bench.run("ask, tokens", {PLAIN: plain, OWN: own})
    yield from compared("ask tokens", seconds, batch=1, unit="token", items=TOKENS, plain=PLAIN)
