"""The options of a training run: one dataclass per TOML section, every key with its meaning, default and range.

`python -m blip3o_core.train CONFIG.toml --print-config` prints them all, with what the file and the command line have set.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sample import TASKS
from ..errors import ConfigError
from ..lora.targets import DIT_TARGETS, LANGUAGE_MODEL_TARGETS
from .options import build, option, read_toml, to_toml, with_overrides

LORA_PARTS = ("dit", "language_model")
PARTS = ("dit", "latent_queries", "backbone", "vision", "clip", "decoder", "vae", "vae_decoder")
RESERVED_NAMES = ("trained", "ema")  # files of a checkpoint, beside which the LoRA lies
FORMATS = ("auto", "folder", "jsonl", "conversations", "edits", "webdataset")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """[model]: what is trained from."""

    path: str = option("", "folder of the BLIP3-o checkpoint (config.json, tokenizer, model*.safetensors)")
    vision_encoder: str = option("", "folder or file of the EVA-CLIP tower, if the checkpoint comes without it")
    decoder: str = option("", "folder of the diffusion decoder for sample pictures; empty: diffusion-decoder/ of the checkpoint")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """[train]: what is trained, how long, in which precision."""

    method: str = option("lora", "lora: small matrices beside frozen layers; full: the parts listed below", choices=("lora", "full"))
    parts: tuple[str, ...] = option((), "method full: which networks train; all others stay frozen. clip is the EVA-CLIP tower, decoder "
                                    "the UNet, vae the decoder's autoencoder, vae_decoder only the half of it that makes pixels",
                                    choices=PARTS)
    fresh: tuple[str, ...] = option((), "method full: which of these parts start from random weights instead of the checkpoint's",
                                    choices=tuple(part for part in PARTS if part != "vae_decoder"))
    steps: int = option(1000, "updates of the weights", minimum=1)
    batch_size: int = option(4, "samples per process and micro-batch", minimum=1)
    gradient_accumulation: int = option(1, "micro-batches per update", minimum=1)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 turns it off", minimum=0)
    precision: str = option("auto", "bf16 or fp16: autocast over float32 trained weights; auto: bf16 on an accelerator, fp32 on the CPU",
                            choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: about a third slower, much less memory")
    compile: bool = option(False, "torch.compile for the DiT and for the language model where gradients pass through it: minutes at the "
                           "start, then faster (the DiT 1.3 times on a CPU); needs a C++ compiler on the CPU, triton on CUDA")
    ema_decay: float = option(0.0, "moving average of the trained weights, which is then exported; 0.999 is usual, 0 turns it off",
                              minimum=0, maximum=0.99999)
    prompt_form: str = option("inference", "inference: the open assistant turn that drawing uses; reference: closed, as the published "
                              "models were trained", choices=("inference", "reference"))
    seed: int = option(0, "of everything random: order, noise, timesteps, dropout, augmentation", minimum=0)
    device: str = option("auto", "auto, cpu or cuda; several devices are the business of `accelerate launch`")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """[lora]: the adapters, as in peft."""

    parts: tuple[str, ...] = option(("dit",), "networks that get adapters", choices=LORA_PARTS)
    rank: int = option(16, "inner width of the adapters", minimum=1)
    alpha: float = option(16.0, "strength: the update is scaled by alpha / rank", minimum=0.001)
    dropout: float = option(0.0, "on the input of the adapters", minimum=0, maximum=0.95)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    dora: bool = option(False, "train the magnitude of each column apart from its direction (slower)")
    dit_targets: tuple[str, ...] = option(DIT_TARGETS, "ends of the names of the DiT's layers; default: attention and feed-forward")
    language_model_targets: tuple[str, ...] = option(LANGUAGE_MODEL_TARGETS, "the same for the language model; default: attention")
    latent_queries: bool = option(False, "also train the 64 learned queries (stored as a difference in the LoRA file)")
    trigger: str = option("", "recorded in the file as the word that calls what was learned; data.trigger puts it into captions")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """[objective]: losses. Flow matching for pictures, cross-entropy for text; samples of all tasks are averaged."""

    timesteps: str = option("uniform", "distribution of the noise levels; uniform is published, logit_normal prefers the middle",
                            choices=("uniform", "logit_normal"))
    logit_mean: float = option(0.0, "of logit_normal; above 0 is more data, below more noise")
    logit_std: float = option(1.0, "of logit_normal", minimum=0.01)
    shift: float = option(1.0, "of the noise schedule; above 1 trains more near the noise", minimum=0.01)
    condition_dropout: float = option(0.1, "share of samples whose query states are zero: what guidance subtracts", minimum=0, maximum=1)
    picture_size: int = option(0, "decode, autoencode: side in pixels of the pictures; 0 takes the decoder's own", minimum=0)
    pixel_weight: float = option(0.0, "contrast: weight of the squared error with which a linear map finds the pixels in the embedding; "
                                 "above 0 embeddings keep the detail that a decoder needs", minimum=0)
    whitening_weight: float = option(0.0, "contrast: weight of a penalty that makes the embedding's channels uncorrelated and of "
                                     "deviation 1, but for what all pictures or all places of one share; above 0 flow matching has an "
                                     "easier time with them", minimum=0)
    draws_per_sample: int = option(1, "drawing tasks, decode: noises and noise levels with which each sample is trained in one step; more "
                                   "of them share the work of encoding it, and need memory like a larger batch; 0 runs no DiT, so that "
                                   "only regression_weight and label_weight teach the language side", minimum=0)
    counted_positions: float = option(0.0, "understand, segment: share of samples whose positions count up through pictures, as they do "
                                      "when drawing, in place of Qwen's rows and columns: for a language model that starts from nothing",
                                      minimum=0, maximum=1)
    regression_weight: float = option(0.0, "drawing tasks, where queries or language model train: weight of the squared error with which a "
                                      "linear map finds the embedding in the query states (the paper's CLIP + MSE), beside flow matching: "
                                      "a language model that starts from nothing learns from it what a prompt asks for", minimum=0)
    label_weight: float = option(0.0, "drawing tasks, where queries or language model train: weight of the cross-entropy with which a "
                                 "linear map finds in the query states which labels the cells of the picture to be drawn have; for tars "
                                 "whose samples have a map called .labels.png, and centre crops", minimum=0)
    changed_weight: float = option(1.0, "edit: weight of the tokens in which source and target differ, next to 1 for the others; above 1 "
                                   "small edits are learned sooner, for most of a target can be copied (as in arXiv:2506.03147), but what "
                                   "should stay is drawn with less care; for sources and targets that show the same place", minimum=0)
    noisy_weight: float = option(1.0, "decode: errors in noisy latents count up to so many times as much, as if the network predicted the "
                                 "velocity; 1 is published, nano's decoder trains with 100", minimum=1)
    embedding_noise: float = option(0.0, "decode: up to so much noise, in deviations, is added to the embeddings, so that the decoder bears"
                                    " the small errors of those that a DiT draws (arXiv:2106.15282, sec. 4)", minimum=0)
    latent_noise: float = option(0.0, "autoencode: deviation of noise that is added to the latents, which have one of about 1 themselves; "
                                 "above 0 pixels depend less on small errors of the diffusion", minimum=0)
    thumbnail_weight: float = option(0.0, "autoencode: weight of the squared error with which a linear map finds the picture, as small as "
                                     "the latents, in the latents; above 0 colours are values of the latents, not patterns, which a "
                                     "decoder learns more easily", minimum=0)
    local_attention_weight: float = option(0.0, "drawing tasks, decode: weight of a loss that makes one head of every cross-attention "
                                           "look at the part of the condition that lies where it is: for a DiT or UNet that starts from "
                                           "nothing", minimum=0)
    weights: dict[str, float] = option({}, "weight of the loss per task, 1 unless given, for instance {understand = 0.5}", keys=TASKS,
                                       minimum=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """[optimizer]: how gradients change the weights."""

    name: str = option("adamw", "adamw; muon (full training from nothing: orthogonal updates for hidden matrices and convolutions, "
                       "AdamW's learning rates); adamw8bit (extra adamw8bit, CUDA); prodigy (extra prodigy, learning_rate 1)",
                       choices=("adamw", "muon", "adamw8bit", "prodigy"))
    learning_rate: float = option(1e-4, "peak", minimum=0, maximum=1000)
    beta1: float = option(0.9, "decay of the gradient's average", minimum=0, maximum=0.999999)
    beta2: float = option(0.999, "decay of its square's average", minimum=0, maximum=0.999999)
    epsilon: float = option(1e-8, "added to the denominator", minimum=1e-20)
    weight_decay: float = option(0.0, "decoupled; the published runs use 0", minimum=0)
    schedule: str = option("cosine", "of the learning rate after warm-up", choices=("cosine", "constant"))
    warmup_steps: int = option(0, "updates of linear rise at the start", minimum=0)
    minimum_ratio: float = option(0.1, "of the peak, where cosine ends", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """[[data]]: one dataset; several are mixed in one run."""

    path: str = option("", "folder, .jsonl, .json, or tars: one file or a glob such as shards/*.tar")
    format: str = option("auto", "auto looks at the path. folder: images with a .txt of the same name; jsonl: file_name, text; "
                         "conversations: LLaVA's JSON; edits: source, instruction, target; webdataset: tars", choices=FORMATS)
    task: str = option("text_to_image", "what is learned from it", choices=TASKS)
    images: str = option("", "folder that file names in .json and .jsonl start from; empty: where that file lies")
    weight: float = option(0.0, "share of this dataset among the drawn samples, relative to the others; 0: its number of samples",
                           minimum=0)
    repeats: int = option(1, "times each sample counts in an epoch, where weight is 0", minimum=1)
    samples: int = option(0, "webdataset: number of samples in all tars; 0 counts them at the start", minimum=0)
    shuffle_buffer: int = option(1000, "webdataset: samples among which the next is picked", minimum=1)
    trigger: str = option("", "word put before every caption")
    caption_dropout: float = option(0.0, "share of draws with an empty caption", minimum=0, maximum=1)
    flip: float = option(0.0, "share of draws mirrored left to right", minimum=0, maximum=1)
    crop: str = option("centre", "of pictures that are not square", choices=("centre", "random"))


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """[loader]: reading the data."""

    workers: int = option(2, "processes per training process that read and prepare samples; 0 reads in the training process", minimum=0)
    max_broken: int = option(100, "unreadable samples to skip (named in broken.jsonl) before the run stops", minimum=0)
    max_pixels: int = option(448 * 448, "pictures inside questions are shrunk to this many pixels; 784 pixels are one token", minimum=784)
    max_tokens: int = option(512, "longest conversation in tokens, pictures included; longer ones count as broken", minimum=66)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """[cache]: what frozen networks compute from the data, computed once and kept on disk."""

    enabled: bool = option(False, "EVA-CLIP features and, unless the language side trains, query states (bf16, float32 in fp32 runs); "
                           "read instead of running, or even loading, those networks")
    folder: str = option("", "empty: cache/ in the output folder. Runs on the same model may share one")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """[validation]: the loss on fixed samples, noise and timesteps; the one number that shows progress."""

    every: int = option(100, "updates between validations; 0 turns them off", minimum=0)
    samples: int = option(16, "per task", minimum=1)
    timesteps: int = option(4, "noise levels per sample, spread evenly", minimum=1)
    data: tuple[DataOptions, ...] = option((), "[[validation.data]]: datasets as in [[data]]; none: the first samples of the training data")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """[samples]: pictures drawn while training, at step 0 and every so many updates, one grid per time."""

    every: int = option(0, "updates between grids; 0 turns them off", minimum=0)
    prompts: tuple[str, ...] = option((), "what is drawn; a prompt with a picture below is an edit instruction")
    images: tuple[str, ...] = option((), "for each prompt the picture that it edits, empty strings for none")
    seed: int = option(0, "the same for every prompt and time, so that only the weights differ", minimum=0)
    steps: int = option(12, "of the embedding", minimum=1, maximum=1000)
    guidance_scale: float = option(3.0, "of the embedding", minimum=0, maximum=100)
    decoder_steps: int = option(20, "of the picture", minimum=1, maximum=999)
    decoder_guidance_scale: float = option(3.0, "of the picture; 1 needs no null embedding and half the time", minimum=0, maximum=100)
    width: int = option(512, "pixels, a multiple of 8", minimum=64)
    height: int = option(512, "pixels, a multiple of 8", minimum=64)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """[output]: where everything goes, and how often it is saved."""

    folder: str = option("training", "for checkpoints, logs, pictures and the result; must be new, empty, or resumed")
    name: str = option("blip3o_lora", "of the LoRA file")
    resume: str = option("", "latest: the newest checkpoint in the folder, or a fresh start where there is none; or a checkpoint's path")
    save_every: int = option(500, "updates between checkpoints; 0: only at the end and when stopped", minimum=0)
    keep: int = option(2, "newest checkpoints that are kept", minimum=1)
    log_every: int = option(10, "updates between lines of the log", minimum=1)
    wandb: str = option("", "project name; logs to Weights & Biases too (extra wandb)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: ModelOptions = ModelOptions()
    train: TrainOptions = TrainOptions()
    lora: LoraOptions = LoraOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    data: tuple[DataOptions, ...] = ()
    loader: LoaderOptions = LoaderOptions()
    cache: CacheOptions = CacheOptions()
    validation: ValidationOptions = ValidationOptions()
    samples: SampleOptions = SampleOptions()
    output: OutputOptions = OutputOptions()

    def __post_init__(self) -> None:
        if self.train.method == "full" and not self.train.parts:
            raise ConfigError(f"train.parts is empty, but train.method is full. List what trains: {', '.join(PARTS)}.")
        if {"vae", "vae_decoder"} <= set(self.train.parts):
            raise ConfigError("train.parts lists vae and vae_decoder, which is one half of it. Remove one of them.")
        for part in self.train.fresh:
            if part not in self.train.parts:
                raise ConfigError(f"train.fresh has {part}, which doesn't train: its random weights would stay random. Add {part} to "
                                  "train.parts, or remove it.")
        if self.train.method == "lora" and self.train.parts:
            raise ConfigError('train.parts is for train.method = "full"; with lora, lora.parts says which networks get adapters.')
        if self.train.method == "lora" and not self.lora.parts and not self.lora.latent_queries:
            raise ConfigError(f"lora.parts is empty: nothing would train. List {' or '.join(LORA_PARTS)}.")
        if self.train.compile and self.train.gradient_checkpointing:
            raise ConfigError("train.compile and train.gradient_checkpointing don't work together: recomputed layers run one by one, past "
                              "what was compiled. Turn one of them off.")
        if self.objective.local_attention_weight and self.train.gradient_checkpointing:
            raise ConfigError("objective.local_attention_weight and train.gradient_checkpointing don't work together: what the heads look "
                              "at is not kept when layers are recomputed. Turn one of them off.")
        if self.samples.images and len(self.samples.images) != len(self.samples.prompts):
            raise ConfigError(f"samples.images has {len(self.samples.images)} entries for {len(self.samples.prompts)} samples.prompts. "
                              "Give one per prompt, empty strings for none.")
        if self.samples.every and not self.samples.prompts:
            raise ConfigError("samples.every is set, but samples.prompts is empty. Give at least one prompt.")
        if self.train.method == "lora":
            for part, targets in (("dit", self.lora.dit_targets), ("language_model", self.lora.language_model_targets)):
                if part in self.lora.parts and not targets:
                    raise ConfigError(f"lora.{part}_targets is empty, but lora.parts has {part}. Leave the targets out for the usual "
                                      f"layers, or remove {part} from lora.parts.")
        if self.optimizer.name == "prodigy" and self.optimizer.learning_rate < 0.01:
            raise ConfigError(f"optimizer.name is prodigy, which finds the rate by itself and scales it by optimizer.learning_rate = "
                              f"{self.optimizer.learning_rate:g}: nothing would be learned. Set it to 1.")
        if self.optimizer.warmup_steps > self.train.steps:
            raise ConfigError(f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is more than train.steps = {self.train.steps}: the "
                              "learning rate would never reach its peak. Lower the one or raise the other.")
        _require_file_name(self.output.name)
        for section, datasets in (("data", self.data), ("validation.data", self.validation.data)):
            for index, data in enumerate(datasets):
                _require_sensible(f"{section}.{index}", data)

    def require_complete(self) -> None:
        """Raises ConfigError unless a model and data are named."""
        if not self.model.path:
            raise ConfigError("model.path is not set. Name the checkpoint folder, in the file or as model.path=FOLDER.")
        if not self.data:
            raise ConfigError("there is no [[data]] section. Name at least one dataset: path and task.")
        for section, datasets in (("data", self.data), ("validation.data", self.validation.data)):
            for index, data in enumerate(datasets):
                if not data.path:
                    raise ConfigError(f"{section}.{index}.path is not set. Name a folder, a .json, a .jsonl or tars.")

    @property
    def trains_language_side(self) -> bool:
        """Whether query states change while training, so that they can't be cached."""
        if self.train.method == "lora":
            return "language_model" in self.lora.parts or self.lora.latent_queries
        return not {"latent_queries", "backbone", "vision"}.isdisjoint(self.train.parts)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Networks of PARTS whose weights, adapters or queries change."""
        if self.train.method == "full":
            return self.train.parts
        names = {"dit": "dit", "language_model": "backbone"}
        return (*(names[part] for part in self.lora.parts), *(("latent_queries",) if self.lora.latent_queries else ()))


def _require_file_name(name: str) -> None:
    bad = sorted({letter for letter in name if letter in '/\\:*?"<>|' or not letter.isprintable()})
    if bad or not name.strip() or name.startswith(".") or name.endswith(".safetensors") or name in RESERVED_NAMES:
        raise ConfigError(f"output.name: {name!r} can't be the name of a LoRA file. Give a plain name such as fox, without folder, without "
                          f".safetensors and without {' '.join(bad) or 'special characters'}; {' and '.join(RESERVED_NAMES)} are taken.")


def _require_sensible(section: str, data: DataOptions) -> None:
    """Raises ConfigError for what the task would ignore, or what would spoil it."""
    captioned = data.task in ("text_to_image", "edit", "contrast")
    if data.trigger and not captioned:
        raise ConfigError(f"{section}.trigger: the task {data.task} has no captions. Remove it.")
    if data.caption_dropout and data.task not in ("text_to_image", "edit"):
        raise ConfigError(f"{section}.caption_dropout: has no effect on the task {data.task}. Remove it.")
    if data.flip and data.task in ("edit", "understand"):
        raise ConfigError(f"{section}.flip: mirrored pictures contradict the words left and right of the task {data.task}. Remove it.")
    if data.flip and data.task == "text":
        raise ConfigError(f"{section}.flip: the task text has no pictures. Remove it.")
    if data.crop == "random" and data.task in ("edit", "understand", "text", "segment"):
        raise ConfigError(f'{section}.crop = "random" has no use for the task {data.task}'
                          f"{': source and target would show different parts' if data.task == 'edit' else ''}. Remove it.")
    if data.weight and data.repeats != 1:
        raise ConfigError(f"{section}: weight = {data.weight:g} and repeats = {data.repeats} contradict each other. repeats counts only "
                          "where weight is 0; remove one.")
    if data.samples and data.format not in ("auto", "webdataset"):
        raise ConfigError(f"{section}.samples is only for tars; a {data.format} is counted. Remove it.")


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a TOML file, then `section.key=value` words; relative paths stay relative to the working folder.

    Raises: ConfigError naming the key, its value and what it may be; for an unknown key the nearest known one.
    """
    values: dict[str, Any] = {} if file is None else read_toml(Path(file))
    return build(TrainConfig, with_overrides(values, overrides))


def print_config(config: TrainConfig) -> str:
    """The configuration as TOML, each key behind its documentation."""
    return to_toml(config)


# Keys that may differ when a run is resumed: they change neither the weights nor the order of the data.
RESUMABLE = {
    "train.steps", "train.device", "loader.workers", "loader.max_broken", "validation", "samples", "output", "cache.folder",
    "model.path", "model.decoder", "model.vision_encoder",
}  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for everything that a resumed run must not change; both as from `as_dict`.

    A key that `old` lacks is younger than that run, which then trained with what is the key's default today.
    """
    found = []
    defaults = as_dict(TrainConfig())

    def compare(path: str, a: Any, b: Any, default: Any) -> None:
        if path in RESUMABLE:
            return
        if isinstance(a, dict) and isinstance(b, dict):
            own = default if isinstance(default, dict) else {}
            for key in sorted({*a, *b}):
                compare(f"{path}.{key}" if path else key, a.get(key, own.get(key)), b.get(key), own.get(key))
        elif a != b:
            found.append(f"{path}: {a!r} -> {b!r}")

    compare("", old, new, defaults)
    return found


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain tables and lists, as they are stored in checkpoints and LoRA files."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
