"""The untrained checkpoint: nano's sizes in the published layout, start values by seed, and a tokenizer of the words it will read."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.save import whole_folder, write_safetensors
from ..models.eva_clip import EMBEDDING_GRID, EvaClip
from ..models.nextdit import NextDiT
from ..models.qwen2_5_vl import Backbone, VisionTower, text_config, vision_config
from ..presets import PRESETS
from ..prompts import NULL_PROMPT, RECONSTRUCT_INSTRUCTION, SYSTEM, generation_template
from ..shapes import edits, questions, texts
from ..shapes.datasets import described_scene
from ..shapes.facts import random_scene
from ..train.fresh import start_afresh
from . import sizes

TOKENIZER_SAMPLES = 1000
FRAME_REPEATS = 500  # the words of the templates become one token each
POSITION_SCALE = 0.5  # of the first positions of EVA-CLIP, as loud as a patch, and of the queries, which are nothing else at first


def write_skeleton(folder: Path, *, seed: int) -> None:
    """Writes an untrained checkpoint. Raises OutputError if `folder` is not empty."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with whole_folder(folder) as temporary:
        token_ids = _write_tokenizer(temporary, seed)
        config = sizes.model_config(token_ids, max(token_ids.values()) + 1)
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
        write_safetensors(temporary / "model.safetensors", _root_tensors(config, temporary, seed), {"format": "pt"})

        decoder = temporary / "diffusion-decoder"
        networks = {"unet": (sizes.UNET_CONFIG, UNet2DConditionModel), "vae": (sizes.VAE_CONFIG, AutoencoderKL)}
        for name, (settings, kind) in networks.items():
            network = kind.from_config(settings)
            start_afresh(network, "decoder" if name == "unet" else name, seed)
            (decoder / name).mkdir(parents=True)
            _write_json(decoder / name / "config.json", settings)
            write_safetensors(decoder / name / "diffusion_pytorch_model.safetensors", _bf16(network.state_dict()), {"format": "pt"})
        (decoder / "scheduler").mkdir()
        _write_json(decoder / "scheduler" / "scheduler_config.json", sizes.SCHEDULER_CONFIG)


def _root_tensors(config: dict, folder: Path, seed: int) -> dict[str, Tensor]:
    """Names as in the published shards."""
    backbone = Backbone.empty(text_config(config, folder), sizes.NUM_QUERIES).to_empty(device="cpu")
    vision_tower = VisionTower.empty(vision_config(config, folder)).to_empty(device="cpu")
    dit, eva = NextDiT(sizes.DIT), EvaClip(sizes.EVA)
    for network, part in ((backbone.language_model, "backbone"), (vision_tower, "vision"), (dit, "dit"), (eva, "clip")):
        start_afresh(network, part, seed)
    for layer in dit.layers:
        layer.gate.data.fill_(1.0)  # listens to the prompt from the first step
        layer.attn2.norm_q.bias.data.fill_(1.0)  # what is turned by positions, so that heads may learn to look where they are
    backbone.latent_queries.data = POSITION_SCALE * _positions(EMBEDDING_GRID, sizes.WIDTH)[None]
    eva.pos_embed.data[0, 1:] = POSITION_SCALE * _positions(sizes.EVA.grid, sizes.EMBEDDING_WIDTH)
    prefixes: dict[str, nn.Module] = {
        "model.": backbone.language_model, "visual.": vision_tower.network, "model.dit.model.": dit,
        "model.gen_vision_tower.vision_tower.model.": eva,
    }  # fmt: skip
    tensors = {prefix + name: value for prefix, network in prefixes.items() for name, value in network.state_dict().items()}
    return _bf16({**tensors, "model.latent_queries": backbone.latent_queries.data})


def _positions(grid: int, width: int) -> Tensor:
    """(grid * grid, width): sines and cosines of row and column."""
    frequencies = math.pi / grid * (grid / 2) ** (torch.arange(width // 4) / (width // 4 - 1))  # half a wave to 4 patches a wave
    angles = (torch.arange(grid) + 0.5)[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (grid, width / 2)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=2).flatten(0, 1)


def _bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(torch.bfloat16).contiguous() for name, value in tensors.items()}


def _write_tokenizer(folder: Path, seed: int) -> dict[str, int]:
    """Qwen's byte-level BPE with merges learned from texts of the world -> ids of the special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    (folder / "vocab.json").write_text(json.dumps({"a": 0}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    qwen = Qwen2TokenizerFast(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt")).backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = qwen.pre_tokenizer, qwen.normalizer
    trainer = trainers.BpeTrainer(vocab_size=sizes.VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_texts(seed), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")

    ids = {token: len(model["vocab"]) + index for index, token in enumerate(sizes.SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(folder / "added_tokens.json", ids)
    _write_json(folder / "special_tokens_map.json", {
        "additional_special_tokens": list(sizes.SPECIAL_TOKENS[2:]), "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    })  # fmt: skip
    _write_json(folder / "tokenizer_config.json", {
        "added_tokens_decoder": {str(id): {"content": str(AddedToken(token)), **flags} for token, id in ids.items()},
        "additional_special_tokens": list(sizes.SPECIAL_TOKENS[2:]),
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "tokenizer_class": "Qwen2Tokenizer",
    })  # fmt: skip
    return ids


def _texts(seed: int) -> Iterator[str]:
    frame = "".join(piece for piece in generation_template("") if isinstance(piece, str))
    yield from [frame, SYSTEM, RECONSTRUCT_INSTRUCTION, NULL_PROMPT, "system\n", "user\n", "assistant\n"] * FRAME_REPEATS
    yield from (preset.question for preset in PRESETS.values())
    rng = np.random.default_rng(np.random.SeedSequence([seed, *b"tokenizer"]))
    for index in range(TOKENIZER_SAMPLES):
        yield described_scene(rng)[1]
        yield edits.make_edit(edits.KINDS[index % len(edits.KINDS)], rng).instruction
        task = texts.make_text(texts.KINDS[index % len(texts.KINDS)], rng)
        asked = questions.questions(random_scene(rng), rng)
        yield from itertools.chain((task.question, task.answer), *((question.text, question.answer) for question in asked))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
