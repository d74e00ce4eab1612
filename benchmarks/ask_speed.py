"""Tokens per second of `ask` against transformers' own `generate` on the same weights, in one run.

    python benchmarks/ask_speed.py [--hidden 512] [--layers 8] [--tokens 128] [--rounds 5] [--json]

A synthetic model of the published architecture (random weights, float32 on the CPU or --device) writes the same number of greedy
tokens through both loops, after a warm-up, in alternating rounds; medians and their ratio are printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from blip3o_core.models.qwen2_5_vl import Backbone, text_config
from blip3o_core.pipelines.chat import Chat
from blip3o_core.prompts import PromptTokenizer, open_turn, turn

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "sdxl" / "checkpoint"
QUESTION = "Describe how rain forms over the sea, step by step."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 512), ("layers", 8), ("tokens", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = build(args.hidden, args.layers, torch.device(args.device))

    def rate(write) -> float:
        began = time.perf_counter()
        count = write(args.tokens)
        return count / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {"ask": [], "transformers generate": []}
    for round_index in range(args.rounds + 1):
        for name, write in (("ask", ours), ("transformers generate", theirs)):
            measured = rate(write)
            if round_index:  # the first round warms up
                rates[name].append(measured)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {**{f"{name} tokens/s": round(value, 1) for name, value in medians.items()},
              "ratio": round(medians["ask"] / medians["transformers generate"], 3)}  # fmt: skip
    print(json.dumps(result) if args.json else "\n".join(f"{key:<32}{value}" for key, value in result.items()))


def build(hidden: int, layers: int, device: torch.device):
    """Two functions (tokens to write) -> tokens written, on one set of weights."""
    tokenizer = PromptTokenizer(TOKENIZER)
    sizes = dict(vocab_size=417, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                 num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256),
                 rope_scaling={"mrope_section": [8, 12, 12]}, max_position_embeddings=4096)  # fmt: skip
    config = text_config(sizes, "benchmark")
    backbone = Backbone(config, 64).to(device).eval()
    head = torch.nn.Linear(hidden, 417, bias=False).to(device)
    models = SimpleNamespace(tokenizer=tokenizer, device=device, dtype=torch.float32, backbone=backbone, output_head=head,
                             context_tokens=backbone.context_tokens)  # fmt: skip
    tokenizer.__dict__["stop_ids"] = frozenset()  # neither loop stops early

    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=config.to_dict()))
    reference.model.language_model, reference.lm_head = backbone.language_model, head
    reference.model.visual = None
    reference.generation_config.eos_token_id = None
    chat = Chat(models)
    pieces = [*turn("system", chat.messages[0].text), *turn("user", QUESTION), *open_turn()]
    ids = torch.tensor([tokenizer.ids(pieces)], device=device)

    def ask(count: int) -> int:
        return len(Chat(models).say(QUESTION, max_new_tokens=count, return_ids=True))

    @torch.inference_mode()
    def generate(count: int) -> int:
        out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                                 do_sample=False, use_cache=True, pad_token_id=401)  # fmt: skip
        return out.shape[1] - ids.shape[1]

    return ask, generate


if __name__ == "__main__":
    main()
