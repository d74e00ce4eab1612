"""Blip3oPipeline: prompt -> query states -> CLIP embedding -> picture, each stage callable by itself.

B batch, Q = 64 queries, H width of the backbone, C width of a CLIP embedding (1792 at full size).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..checkpoint.load import OnLoad
from ..errors import Blip3oError, InputError
from ..images import eva_pixel_values, siglip_pixel_values, to_rgb_images
from ..lora.chosen import ChosenLora, open_loras
from ..models.eva_clip import EMBEDDING_GRID, EvaClip
from ..models.nextdit import NextDiT
from ..models.qwen2_5_vl import Backbone, VisionTower
from ..models.sana import SanaDecoder
from ..models.sdxl import SdxlDecoder
from ..models.siglip2 import Siglip2
from ..prompts import NULL_PROMPT, PromptTokenizer
from ..runtime import resolve_device, resolve_dtype
from ..sampling.flow_matching import NUM_TRAIN_TIMESTEPS, flow_sigmas, require_guidance_interval, truncate_timestep
from ..sampling.noise import require_seed, seeded_noise
from ..sampling.solvers import SOLVERS, require_solver
from ..variants.blip3o import Blip3oCheckpoint, DrawingDefaults
from ..variants.decoders import DecoderCheckpoint, open_decoder
from ..variants.eva_clip import EvaClipCheckpoint
from ..variants.sdxl_decoder import SdxlDecoderCheckpoint, find_sdxl_decoder
from .chat import MAX_NEW_TOKENS, Chat, OnToken, some_rgb_images
from .edit import DrawingChat, edit, vary
from .language import TRAINED_SIZE, encode_prompts
from .residency import OFFLOADS, STAGES, choose, free_memory, others, require_offload, weight_bytes

OUTPUT_TYPES = ("pil", "pt", "latent")
NULL_SEED, NULL_GUIDANCE = 0, 3.0  # of the null prompt's sample: the guidance of the reference, and a seed
MAX_DECODER_STEPS = 999
MIN_SIDE, MAX_SIDE = 64, 4096

T = TypeVar("T")
OnStep = Callable[[str, int, int], None]
"""(stage, steps done, steps in all), called after every step; raise in it to cancel."""


class Blip3oPipeline:
    """One checkpoint, opened and checked; every network is loaded when it is first needed and then kept."""

    def __init__(
        self, checkpoint: Blip3oCheckpoint, decoder_checkpoint: DecoderCheckpoint | None, *, device: torch.device,
        dtype: torch.dtype, vision_source: EvaClipCheckpoint | None = None, on_load: OnLoad | None = None,
        loras: Sequence[ChosenLora] = (), backbone: Backbone | None = None, dit: NextDiT | None = None,
        decoder_network: SdxlDecoder | SanaDecoder | None = None, vision_tower: VisionTower | None = None, offload: str | None = "none",
    ) -> None:  # fmt: skip
        """Most callers want `from_pretrained`.

        Args:
            loras: as from `open_loras`; merged into networks that are loaded here.
            backbone, dit, decoder_network, vision_tower: networks that the caller already has, used as they are and never freed.
            offload: of OFFLOADS; None or "auto" chooses by the free memory of the device.
        """
        self.checkpoint = checkpoint
        self.decoder_checkpoint = decoder_checkpoint
        self.device = device
        self.dtype = dtype
        self._on_load = on_load
        self._vision_source = vision_source
        self._loras = tuple(loras)
        self._backbone = backbone
        self._vision_tower = vision_tower
        self._output_head: nn.Module | None = None
        self._vision_encoder: EvaClip | None = None
        self._dit = dit
        self._decoder = decoder_network
        self._decoder_encoder: Siglip2 | None = None
        self._null_embeddings: dict[tuple, Tensor] = {}
        self._null_states: Tensor | None = None
        self._given = {name for name in itertools.chain(*STAGES.values()) if getattr(self, f"_{name}") is not None}
        self.offload = self._chosen_offload(offload)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
        decoder: str | Path | None = None, vision_encoder: str | Path | None = None, *,
        loras: Sequence[tuple[str | Path, float]] = (), allow_other_base: bool = False, sana_positions: str | None = None,
        decoder_scheduler: str | None = None, offload: str | None = "auto", qwen: str | Path | None = None, on_load: OnLoad | None = None,
    ) -> "Blip3oPipeline":  # fmt: skip
        """Opens a checkpoint folder of the published layout. Only local files are read.

        Args:
            path: folder with config.json, tokenizer and `model*.safetensors`.
            device: None or "auto" takes an accelerator if there is one.
            dtype: None or "auto" is float32 on the CPU and bfloat16 elsewhere.
            decoder: a folder with unet/, vae/, scheduler/ (SDXL), or a SigLIP2 + SANA decoder, which draws only embeddings of its own
                encoder; None takes `diffusion-decoder/` of `path` if it exists.
            vision_encoder: folder or file of the EVA-CLIP tower; None takes the one inside the checkpoint when it is needed.
            loras: (file, strength) pairs, added to the weights in this order when those are loaded.
            allow_other_base: take LoRAs that say they were trained on another base; layers and shapes must fit anyway.
            sana_positions: a switch of SANA decoders, see `SanaDecoderCheckpoint.open`.
            decoder_scheduler: "dpmsolver++" or "euler"; None takes that of the reference, which for the SDXL decoder is euler.
            offload: which networks are in memory at once: "none" (all that were needed), "stage" (those of one stage), "layer" (one
                layer at a time); "auto" takes the first that fits into the free memory of the device.
            qwen: folder or file of the Qwen2.5-VL-Instruct that a split takes its backbone from (`blip3o split`).
            on_load: (component, bytes read, bytes in all) while weights are loaded.
        Raises: CheckpointError if files are missing or damaged, don't match, or the decoder reads other embeddings; InputError
            if a LoRA is for another base.
        """
        device = resolve_device(device)
        checkpoint = Blip3oCheckpoint.open(path, qwen=qwen)
        checkpoint.tokenizer  # noqa: B018 -- a folder without tokenizer fails here, not after minutes of loading
        decoder_checkpoint = None
        if decoder is not None or find_sdxl_decoder(checkpoint.folder) is not None:
            decoder_checkpoint = open_decoder(decoder if decoder is not None else checkpoint.folder, positions=sana_positions,
                                              scheduler=decoder_scheduler)  # fmt: skip
            has_encoder = decoder_checkpoint.has_encoder  # then it can draw what others can't
            if not has_encoder and decoder_checkpoint.embedding_width != checkpoint.dit_config.in_channels:
                raise InputError(f"{decoder_checkpoint.folder}: this decoder reads embeddings of width "
                                 f"{decoder_checkpoint.embedding_width}, {checkpoint.folder} makes width "
                                 f"{checkpoint.dit_config.in_channels}. Use the decoder of the same family.")
        vision_source = None if vision_encoder is None else EvaClipCheckpoint.open(vision_encoder)
        if vision_source is not None:
            _require_width(vision_source, checkpoint)
        opened = open_loras(checkpoint, loras, allow_other_base=allow_other_base)
        return cls(checkpoint, decoder_checkpoint, device=device, dtype=resolve_dtype(dtype, device), vision_source=vision_source,
                   on_load=on_load, loras=opened, offload=offload)  # fmt: skip

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The checkpoint's tokenizer, which keeps user text apart from special tokens."""
        return self.checkpoint.tokenizer

    @property
    def image_side(self) -> int | None:
        """Of a model whose eyes know one size of picture only."""
        return self.checkpoint.image_side

    @property
    def drawing(self) -> DrawingDefaults:
        """The checkpoint's own settings, which stand in for every setting that is None; a SANA decoder brings its own."""
        own = self.checkpoint.drawing
        return own if self.decoder_checkpoint is None else dataclasses.replace(own, **self.decoder_checkpoint.own_settings)

    @property
    def backbone(self) -> Backbone:
        """Language backbone and learned queries."""
        self._enter("backbone")
        if self._backbone is None:
            backbone = self.checkpoint.load_backbone(**self._placement)
            for lora in self._loras:
                lora.merge_backbone(backbone)
            self._backbone = backbone
        return self._backbone

    @property
    def vision_tower(self) -> VisionTower:
        """The backbone's own eyes: images inside prompts. Not the encoder of embeddings."""
        self._enter("vision_tower")
        if self._vision_tower is None:
            self._vision_tower = self.checkpoint.load_vision_tower(**self._placement)
        return self._vision_tower

    @property
    def output_head(self) -> nn.Module:
        """States -> logits, for text."""
        self._enter("output_head")
        if self._output_head is None:
            self._output_head = self.checkpoint.load_output_head(self.backbone, **self._placement)
        return self._output_head

    @property
    def vision_encoder(self) -> EvaClip:
        """EVA-CLIP: `vision_encoder(pixel_values (B, 3, 448, 448))` -> embeddings (B, C, 8, 8).

        Raises CheckpointError if neither `vision_encoder=` nor the checkpoint has one.
        """
        self._enter("vision_encoder")
        if self._vision_encoder is None:
            self._vision_encoder = self.require_vision_encoder().load(**self._placement)
        return self._vision_encoder

    def require_vision_encoder(self) -> EvaClipCheckpoint:
        """Where EVA-CLIP lies. Raises CheckpointError if there is none, InputError if it makes other embeddings; loads nothing."""
        if self._vision_source is None:
            self._vision_source = self.checkpoint.vision_encoder_source()
            _require_width(self._vision_source, self.checkpoint)
        return self._vision_source

    @property
    def dit(self) -> NextDiT:
        """The diffusion transformer: `dit(x (B, C, 8, 8), timestep (B,) in 0..1000, q (B, Q, H))` -> velocity."""
        self._enter("dit")
        if self._dit is None:
            dit = self.checkpoint.load_dit(**self._placement)
            for lora in self._loras:
                lora.merge_dit(dit)
            self._dit = dit
        return self._dit

    @property
    def decoder(self) -> SdxlDecoder | SanaDecoder:
        """Its diffusion network, autoencoder and schedule. Raises CheckpointError if the folder came without a decoder."""
        self._enter("decoder")
        if self._decoder is None:
            if self.decoder_checkpoint is None:
                SdxlDecoderCheckpoint.open(self.checkpoint.folder)  # raises, and says what to do
            self._decoder = self.decoder_checkpoint.load(**self._placement)
        return self._decoder

    @property
    def decoder_encoder(self) -> Siglip2:
        """The encoder that a SANA decoder brings: `decoder_encoder(pixel_values (B, 3, 512, 512))` -> embeddings (B, 1152, 8, 8)."""
        self._enter("decoder_encoder")
        if self._decoder_encoder is None:
            self._decoder_encoder = self.decoder_checkpoint.load_encoder(**self._placement)
        return self._decoder_encoder

    @property
    def _placement(self) -> dict:
        """How networks are loaded."""
        return {"dtype": self.dtype, "device": self.device, "on_load": self._on_load, "stream": self.offload == "layer"}

    def _enter(self, network: str) -> None:
        """Frees the networks of the other stages if only one stage may be in memory."""
        if self.offload == "stage":
            freed = [name for name in others(network) if name not in self._given and getattr(self, f"_{name}") is not None]
            for name in freed:
                setattr(self, f"_{name}", None)
            if freed and self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _chosen_offload(self, offload: str | None) -> str:
        require_offload(offload)
        if offload in OFFLOADS:
            chosen = offload
        else:
            components = self.checkpoint.components
            decoder = {} if self.decoder_checkpoint is None else self.decoder_checkpoint.components
            chosen = choose({
                "language": sum(weight_bytes(components[name], self.dtype) for name in ("language_model", "queries")),
                "embedding": weight_bytes(components["dit"], self.dtype),
                "picture": sum(weight_bytes(entries, self.dtype) for entries in decoder.values()),
            }, free_memory(self.device))  # fmt: skip
            chosen = "stage" if chosen == "layer" and self._loras else chosen
        if chosen == "layer" and self._loras:
            raise InputError("offload \"layer\" reads weights from the files and can't add a LoRA to them. Use stage, or write a merged "
                             "model first: blip3o lora merge.")
        return chosen

    @torch.inference_mode()
    def encode_prompt(
        self, prompts: Sequence[str] | str, *, template: bool = True, images: Sequence | None = None,
        image_size: tuple[int, int] | str | None = TRAINED_SIZE, positions: str = "arange",
        pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Prompts -> query states (B, Q, H) in the dtype of the pipeline; a batch gives the same rows as single runs.

        Args:
            template: put each prompt in the frame of the reference; False takes raw text (the null prompt).
            images: for each prompt its images (PIL or float tensors in 0..1, one or a list), which it then edits or describes.
            image_size: (width, height) that images are brought to first; "trained" is 448 x 448 for published models, as in their
                pipeline; None keeps theirs.
            positions: "arange" as in the reference, or "mrope": image cells by row and column, as in understanding.
            pixel_values, image_grid_thw: images preprocessed by the caller; the text is then complete, pads included
                (template=False), and special tokens in it count.
        Raises: InputError for an empty or too long prompt, or images that don't fit it.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise InputError("no prompt was given. Pass at least one.")
        rows = None if images is None else [some_rgb_images(own) for own in images]
        states = encode_prompts(self, prompts, template=template, images=rows, image_size=image_size, positions=positions,
                                pixel_values=pixel_values, image_grid_thw=image_grid_thw, max_tokens=self.max_prompt_tokens)  # fmt: skip
        return self._finite(states, "query states")

    @torch.inference_mode()
    def sample_embeddings(
        self, q: Tensor, *, steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None, shift: float = 1.0,
        schedule: str | None = None, guidance_interval: tuple[float, float] = (0.0, 1.0), truncate_timesteps: bool | None = None,
        noise: Tensor | None = None, seeds: Sequence[int] | None = None, init: Tensor | None = None, strength: float = 1.0,
        on_step: OnStep | None = None, stage: str = "embedding",
    ) -> Tensor:  # fmt: skip
        """Query states (B, Q, H) -> CLIP embeddings (B, C, 8, 8) float32.

        Args:
            solver: of SOLVERS. None takes the checkpoint's own, "dpmpp_2m" if it was published; "euler" is the reference.
            steps, schedule: None takes those that the solver is meant for: 12 and "cosine" for dpmpp_2m, 30 and "linear" for euler.
            guidance_scale: None takes the checkpoint's own, 3.0 if it was published. 1 is no guidance; above, the null branch (zeros in
                place of q) runs too.
            guidance_interval: lowest and highest sigma at which guidance is used; outside, a step costs half (arXiv:2404.07724).
            shift: of the schedule; 1.0 in the reference.
            truncate_timesteps: integer timesteps as in the reference; None takes what the solver is meant for.
            noise: (B, C, 8, 8) start noise; None draws it from `seeds`, one per row (default 0, 1, 2, ...).
            init, strength: an embedding (B or 1, C, 8, 8) to start from, noised so far that strength = 1 keeps nothing of it.
        Raises: InputError for values out of range, before anything is computed.
        """
        solver, steps, schedule = self.sampler(solver, steps, schedule)
        guidance_scale = _default(guidance_scale, self.drawing.guidance_scale)
        _require_guidance(guidance_scale)
        require_guidance_interval(guidance_interval)
        sigmas = flow_sigmas(steps, shift, strength, schedule)
        if q.ndim != 3 or q.shape[-1] != self.checkpoint.dit_config.context_dim:
            raise InputError(f"query states have shape {tuple(q.shape)}, expected (batch, queries, "
                             f"{self.checkpoint.dit_config.context_dim}) as from encode_prompt.")
        x = self._start_noise(noise, seeds, (len(q), self.checkpoint.dit_config.in_channels, EMBEDDING_GRID, EMBEDDING_GRID))
        if init is not None:
            if init.ndim != 4 or len(init) not in (1, len(x)) or init.shape[1:] != x.shape[1:]:
                raise InputError(f"init has shape {tuple(init.shape)}, expected {tuple(x.shape)}, as from embed_image.")
            x = sigmas[0] * x + (1 - sigmas[0]) * init.to(x)
        elif strength != 1:
            raise InputError(f"strength={strength} needs an embedding to start from: init.")
        truncate = _default(truncate_timesteps, SOLVERS[solver].whole_timesteps)
        velocity = self._guided_velocity(q.to(self.device, self.dtype), guidance_scale, truncate, guidance_interval)
        watch = None if on_step is None else lambda done, total, _: on_step(stage, done, total)
        return self._finite(SOLVERS[solver].sample(velocity, x, sigmas, watch), "embedding")

    def sampler(self, solver: str | None = None, steps: int | None = None, schedule: str | None = None) -> tuple[str, int, str]:
        """(solver, steps, schedule) with the checkpoint's own, or else the solver's own, in place of None. Raises InputError."""
        own = self.drawing
        solver = _default(solver, own.solver)
        require_solver(solver)
        steps = _default(steps, own.steps if solver == own.solver else SOLVERS[solver].steps)
        return solver, steps, _default(schedule, SOLVERS[solver].schedule)

    @torch.inference_mode()
    def null_embedding(
        self, *, seed: int = NULL_SEED, steps: int | None = None, guidance_scale: float = NULL_GUIDANCE, solver: str | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:  # fmt: skip
        """Embedding of the null prompt (1, C, 8, 8): what the decoder is guided away from. Computed once per argument set."""
        solver, steps, _ = self.sampler(solver, steps)
        key = (seed, solver, steps, guidance_scale)
        if key not in self._null_embeddings:
            self._null_embeddings[key] = self.sample_embeddings(
                self._null_query_states(), steps=steps, guidance_scale=guidance_scale, solver=solver, seeds=[seed],
                on_step=on_step, stage="null embedding",
            )  # fmt: skip
        return self._null_embeddings[key]

    def sampled_negative(
        self, negative: Tensor | str | None, decoder_guidance_scale: float | None, solver: str | None, on_step: OnStep | None = None
    ) -> Tensor | str | None:
        """`null_embedding`, by the solver of the pictures, where `negative` asks for it and the decoder is guided; else `negative`."""
        return self.null_embedding(solver=solver, on_step=on_step) if self._needs_null(negative, decoder_guidance_scale) else negative

    def _needs_null(self, negative: Tensor | str | None, decoder_guidance_scale: float | None) -> bool:
        from_null_prompt = negative is None or isinstance(negative, str) and negative == "null_prompt"
        guided = _default(decoder_guidance_scale, self.drawing.decoder_guidance_scale) > 1
        return from_null_prompt and guided and not self._decoder_has_encoder

    def _null_query_states(self) -> Tensor:
        """Of the null prompt (1, Q, H), encoded once."""
        if self._null_states is None:
            self._null_states = self.encode_prompt([NULL_PROMPT], template=False)
        return self._null_states

    @torch.inference_mode()
    def decode_embeddings(
        self, z: Tensor, *, negative: Tensor | str | None = None, steps: int | None = None, guidance_scale: float | None = None,
        width: int | None = None, height: int | None = None, noise: Tensor | None = None, seeds: Sequence[int] | None = None,
        output_type: str = "pil", on_step: OnStep | None = None,
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """CLIP embeddings -> pictures.

        Args:
            z: (B, C, 8, 8), or tokens (B, 64, C): embeddings of the kind that the decoder reads.
            negative: an embedding of the same form (one, or one per picture), "null_prompt" (the reference: see
                `null_embedding`; of a SANA decoder "black_image"), or "zeros"; None takes the first. Not used for guidance_scale <= 1.
            steps, guidance_scale: None takes the checkpoint's own, 50 and 3.0 if it was published (SANA: 30 and 3.0).
            width, height: pixels, multiples of the VAE factor (8, SANA: 32); None takes the checkpoint's own, 1024 if it was published
                (SANA: 512).
            noise: (B, 4, height / 8, width / 8), SANA: (B, 32, height / 32, width / 32); None draws it from `seeds`, one per picture
                (default 0, 1, 2, ...).
            output_type: "pil" (list of images), "pt" (B, 3, height, width) in 0..1, or "latent" (as the noise) before the VAE.
        Raises: InputError for values out of range, CheckpointError if there is no decoder, before anything is computed.
        """
        steps, guidance_scale, width, height = self._decoding_defaults(steps, guidance_scale, width, height)
        self._require_decoding_arguments(steps, guidance_scale, width, height, negative, output_type)
        tokens = self._tokens(z)
        factor = self.decoder_checkpoint.factor
        start = self._start_noise(noise, seeds, (len(tokens), self.decoder_checkpoint.latent_channels, height // factor, width // factor))
        if guidance_scale <= 1:
            negative_tokens = None
        elif negative is None or isinstance(negative, str) and negative in ("null_prompt", "black_image"):
            null = self.black_image_embedding() if self.decoder_checkpoint.has_encoder else self.null_embedding(on_step=on_step)
            negative_tokens = self._tokens(null)
        elif isinstance(negative, str):
            negative_tokens = torch.zeros_like(tokens[:1])
        else:
            negative_tokens = self._tokens(negative)
        if negative_tokens is not None:
            if len(negative_tokens) not in (1, len(tokens)):
                raise InputError(f"negative holds {len(negative_tokens)} embeddings for {len(tokens)} pictures; pass 1 or as many.")
            negative_tokens = negative_tokens.expand(len(tokens), -1, -1)
        watch = None if on_step is None else lambda done, total, _: on_step("picture", done, total)
        latents = self.decoder.sample_latents(
            tokens, negative_tokens, start, steps=steps, guidance_scale=guidance_scale, width=width, height=height, on_step=watch
        )
        self._finite(latents, "latents")
        if output_type == "latent":
            return latents
        pixels = self._finite(self.decoder.decode_latents(latents), "picture")
        return pixels if output_type == "pt" else to_pil(pixels)

    def generate(
        self, prompts: Sequence[str] | str, *, seeds: Sequence[int] | None = None, width: int | None = None, height: int | None = None,
        steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None, schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0), decoder_steps: int | None = None,
        decoder_guidance_scale: float | None = None, negative: Tensor | str | None = None, template: bool = True,
        output_type: str = "pil", on_step: OnStep | None = None,
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Prompts -> pictures: both stages with one seed per picture. Arguments as in the methods for the stages.

        Every argument is checked before the first network runs.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts; pass one seed per picture.")
        self.check_generate(prompts, seeds=seeds, width=width, height=height, steps=steps, guidance_scale=guidance_scale,
                            solver=solver, schedule=schedule, guidance_interval=guidance_interval, decoder_steps=decoder_steps,
                            decoder_guidance_scale=decoder_guidance_scale,
                            negative=negative, template=template, output_type=output_type)  # fmt: skip
        q = self.encode_prompt(prompts, template=template)
        if self._needs_null(negative, decoder_guidance_scale):
            self._null_query_states()  # while the backbone is there
        z = self.sample_embeddings(q, steps=steps, guidance_scale=guidance_scale, solver=solver, schedule=schedule,
                                   guidance_interval=guidance_interval, seeds=seeds, on_step=on_step)  # fmt: skip
        negative = self.sampled_negative(negative, decoder_guidance_scale, solver, on_step)  # while the DiT is there
        return self.decode_embeddings(z, negative=negative, steps=decoder_steps, guidance_scale=decoder_guidance_scale,
                                      width=width, height=height, seeds=seeds, output_type=output_type, on_step=on_step)  # fmt: skip

    def check_generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int], width: int | None = None, height: int | None = None,
        steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None, schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0), decoder_steps: int | None = None,
        decoder_guidance_scale: float | None = None, negative: Tensor | str | None = None, template: bool = True,
        output_type: str = "pil",
    ) -> None:  # fmt: skip
        """Raises what `generate` would raise for these arguments, without loading or computing anything."""
        _, steps, schedule = self.sampler(solver, steps, schedule)
        guidance_scale = _default(guidance_scale, self.drawing.guidance_scale)
        decoding = self._decoding_defaults(decoder_steps, decoder_guidance_scale, width, height)
        self._prompt_ids(prompts, template=template)
        if prompts and self.decoder_checkpoint is not None and self.decoder_checkpoint.embedding_width != self.embedding_width:
            raise InputError(f"{self.decoder_checkpoint.folder}: {self.decoder_checkpoint.reads}; {self.checkpoint.folder} makes EVA-CLIP "
                             f"embeddings of width {self.embedding_width} from prompts. Draw prompts with an SDXL decoder.")
        for seed in seeds:
            require_seed(seed)
        flow_sigmas(steps, schedule=schedule)
        _require_guidance(guidance_scale)
        require_guidance_interval(guidance_interval)
        self._require_decoding_arguments(*decoding, negative, output_type)

    @torch.inference_mode()
    def embed_image(self, images) -> Tensor:
        """Images (PIL or float tensors in 0..1, one or a list) -> CLIP embeddings (B, C, 8, 8) float32, the form that is sampled.

        Short side to 448 pixels, centre crop, as the training targets were made.
        """
        pixel_values = eva_pixel_values(to_rgb_images(images), size=self.vision_encoder.config.image_size)
        return self._finite(self.vision_encoder(pixel_values.to(self.device, self.dtype)).float(), "embedding")

    @torch.inference_mode()
    def zero_image_embedding(self) -> Tensor:
        """Embedding of a zero pixel tensor (mean colour) (1, C, 8, 8): the null of reconstruction. Encoded once."""
        key = ("zero image",)
        if key not in self._null_embeddings:
            side = self.vision_encoder.config.image_size
            zeros = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
            self._null_embeddings[key] = self.vision_encoder(zeros).float()
        return self._null_embeddings[key]

    @torch.inference_mode()
    def embed_for_decoder(self, images) -> Tensor:
        """Images -> the embeddings (B, C, 8, 8) float32 that the decoder draws: SigLIP2's for SANA, else `embed_image`.

        Centre crop, as in training; for SANA the short side is brought to 512 pixels.
        """
        if self.decoder_checkpoint is None or not self.decoder_checkpoint.has_encoder:
            return self.embed_image(images)
        encoder = self.decoder_encoder
        pixel_values = siglip_pixel_values(to_rgb_images(images), size=encoder.config.image_size)
        return self._finite(encoder(pixel_values.to(self.device, encoder.dtype)).float(), "embedding")

    @torch.inference_mode()
    def black_image_embedding(self) -> Tensor:
        """Embedding of a black picture (1, C, 8, 8) by the encoder of a SANA decoder: its null. Encoded once."""
        key = ("black image",)
        if key not in self._null_embeddings:
            encoder = self.decoder_encoder
            side = encoder.config.image_size
            black = torch.full((1, 3, side, side), -1.0, device=self.device, dtype=encoder.dtype)
            self._null_embeddings[key] = encoder(black).float()
        return self._null_embeddings[key]

    def reconstruct(
        self, images, *, seeds: Sequence[int] | None = None, negative: Tensor | str | None = None, steps: int | None = None,
        guidance_scale: float | None = None, width: int | None = None, height: int | None = None, output_type: str = "pil",
        on_step: OnStep | None = None,
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Images -> embeddings -> pictures. Arguments as in `decode_embeddings`.

        Args:
            negative: None is "zero_image" as in the reference, of a SANA decoder "black_image"; or what `decode_embeddings` takes.
        """
        steps, guidance_scale, width, height = self._decoding_defaults(steps, guidance_scale, width, height)
        negative = self.default_negative(reconstructing=True) if negative is None else negative
        from_zero_image = isinstance(negative, str) and negative == "zero_image" and not self._decoder_has_encoder
        self._require_decoding_arguments(steps, guidance_scale, width, height, None if from_zero_image else negative, output_type)
        z = self.embed_for_decoder(images)
        if from_zero_image:
            negative = self.zero_image_embedding() if guidance_scale > 1 else None
        return self.decode_embeddings(
            z, negative=negative, steps=steps, guidance_scale=guidance_scale, width=width, height=height, seeds=seeds,
            output_type=output_type, on_step=on_step,
        )  # fmt: skip

    def default_negative(self, *, reconstructing: bool = False) -> str:
        """Name of what pictures are guided away from, as in the code of the decoder."""
        if self._decoder_has_encoder:
            return "black_image"
        return "zero_image" if reconstructing else "null_prompt"

    def edit(
        self, images: Sequence, instructions: Sequence[str | Sequence[str]], *, seeds: Sequence[int] | None = None,
        strength: float = 1.0, **settings,
    ) -> list[Image.Image]:  # fmt: skip
        """Changes pictures as told: see `pipelines.edit.edit`."""
        return edit(self, images, instructions, seeds=seeds, strength=strength, **settings)

    def vary(self, images: Sequence, *, seeds: Sequence[int], strength: float = 0.6, **settings) -> list[Image.Image]:
        """Pictures like the given ones: see `pipelines.edit.vary`."""
        return vary(self, images, seeds=seeds, strength=strength, **settings)

    def ask(
        self, question: str, images: Sequence | None = None, *, max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0,
        top_p: float | None = None, top_k: int | None = None, seed: int = 0, system: str | None = None,
        on_token: OnToken | None = None, min_pixels: int | None = None, max_pixels: int | None = None,
        pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, return_ids: bool = False,
    ) -> str | list[int]:  # fmt: skip
        """Answers a question about images, or about nothing but text. Arguments as in `Chat.say`."""
        return Chat(self, system).say(
            question, images, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
            on_token=on_token, min_pixels=min_pixels, max_pixels=max_pixels, pixel_values=pixel_values,
            image_grid_thw=image_grid_thw, return_ids=return_ids,
        )  # fmt: skip

    def chat(self, system: str | None = None) -> "DrawingChat":
        """A conversation that reads, writes and draws."""
        return DrawingChat(self, system)

    def describe(self) -> dict[str, str]:
        """What a recipe must say besides its settings."""
        decoder = self.decoder_checkpoint
        loras = {"loras": ", ".join(lora.label for lora in self._loras)} if self._loras else {}
        return {
            "model": self.checkpoint.folder.resolve().name,
            "decoder": "" if decoder is None else decoder.folder.resolve().name,
            "decoder_scheduler": "" if decoder is None else decoder.scheduler,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "blip3o": __version__,
            "torch": torch.__version__,
            **loras,
        }

    def _prompt_ids(self, prompts: Sequence[str], *, template: bool) -> list[list[int]]:
        return [self.tokenizer.generation_ids(prompt, template=template, max_tokens=self.max_prompt_tokens) for prompt in prompts]

    @property
    def context_tokens(self) -> int:
        """Longest sequence the backbone takes."""
        return self.checkpoint.text_config.max_position_embeddings

    @property
    def max_prompt_tokens(self) -> int:
        """The context less `[IMG]` and the queries."""
        return self.context_tokens - 1 - self.checkpoint.num_queries

    def _guided_velocity(
        self, q: Tensor, guidance_scale: float, truncate: bool, interval: tuple[float, float] = (0.0, 1.0)
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity the solvers integrate. Conditions are projected here, once for all steps."""
        dit = self.dit
        condition = dit.encode_condition(q)
        with_null = condition.after_null(dit.encode_null(q)) if guidance_scale != 1 else None  # the reference puts the null branch first

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            guided = with_null is not None and interval[0] <= sigma <= interval[1]
            x = x.to(self.dtype)
            x = torch.cat((x, x)) if guided else x
            timestep = sigma * NUM_TRAIN_TIMESTEPS
            timestep = (truncate_timestep(timestep) if truncate else timestep).to(self.device).expand(len(x))
            v = dit.denoise(x, timestep, with_null if guided else condition).float()
            if not guided:
                return v
            v_null, v_condition = v.chunk(2)
            return v_null + guidance_scale * (v_condition - v_null)

        return velocity

    def _start_noise(self, noise: Tensor | None, seeds: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        if noise is None:
            seeds = range(shape[0]) if seeds is None else seeds
            if len(seeds) != shape[0]:
                raise InputError(f"{len(seeds)} seeds for a batch of {shape[0]}; pass one seed per picture.")
            noise = seeded_noise(seeds, shape[1:])
        elif tuple(noise.shape) != shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}, expected {shape}.")
        return noise.to(self.device, torch.float32)

    @property
    def embedding_width(self) -> int:
        """C of the embeddings that prompts become."""
        return self.checkpoint.dit_config.in_channels

    @property
    def _decoder_has_encoder(self) -> bool:
        return self.decoder_checkpoint is not None and self.decoder_checkpoint.has_encoder

    def _tokens(self, z: Tensor) -> Tensor:
        width = self.decoder_checkpoint.embedding_width
        if z.ndim == 4 and z.shape[1] == width:
            z = z.flatten(2).transpose(1, 2)
        if z.ndim != 3 or z.shape[-1] != width:
            raise InputError(f"an embedding has shape {tuple(z.shape)}, expected (batch, {width}, 8, 8) or (batch, 64, {width}): "
                             f"{self.decoder_checkpoint.reads}.")
        return z.to(self.device).contiguous()  # strides pick other kernels, which round differently

    def _decoding_defaults(
        self, steps: int | None, guidance_scale: float | None, width: int | None, height: int | None
    ) -> tuple[int, float, int, int]:
        own = self.drawing
        return (_default(steps, own.decoder_steps), _default(guidance_scale, own.decoder_guidance_scale), _default(width, own.width),
                _default(height, own.height))  # fmt: skip

    def _require_decoding_arguments(
        self, steps: int, guidance_scale: float, width: int, height: int, negative: Tensor | str | None, output_type: str
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is unknown. Use one of {', '.join(OUTPUT_TYPES)}.")
        if self.decoder_checkpoint is None:
            SdxlDecoderCheckpoint.open(self.checkpoint.folder)  # raises, and says what to do
        known = (self.default_negative(), "zeros")
        if not isinstance(negative, Tensor) and negative not in (None, *known):
            raise InputError(f"negative is {negative!r:.40}; pass an embedding, or one of {', '.join(known)}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_DECODER_STEPS:
            raise InputError(f"decoder steps={steps!r} is not an integer in 1..{MAX_DECODER_STEPS}.")
        _require_guidance(guidance_scale)
        factor, least = self.decoder_checkpoint.factor, min(MIN_SIDE, self.drawing.width, self.drawing.height)
        for name, side in (("width", width), ("height", height)):
            if not isinstance(side, int) or side % factor or not least <= side <= MAX_SIDE:
                raise InputError(f"{name}={side!r} is not a multiple of {factor} in {least}..{MAX_SIDE} pixels.")

    def _finite(self, tensor: Tensor, what: str) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise Blip3oError(f"the {what} overflowed to nan or infinity in {self.dtype}. Use dtype bfloat16 or float32.")
        return tensor


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in 0..1 -> RGB images."""
    array = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def _default(value: T | None, own: T) -> T:
    return own if value is None else value


def _require_guidance(guidance_scale: float) -> None:
    if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale <= 100:
        raise InputError(f"guidance_scale={guidance_scale!r} is not a number in 0..100; the reference uses 3.0.")


def _require_width(vision_encoder: EvaClipCheckpoint, checkpoint: Blip3oCheckpoint) -> None:
    width = checkpoint.dit_config.in_channels
    if vision_encoder.config.width != width:
        raise InputError(f"this vision encoder makes embeddings of width {vision_encoder.config.width}, {checkpoint.folder} works "
                         f"with width {width}. Use the EVA-CLIP tower of the same family.")
