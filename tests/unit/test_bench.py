"""`blip3o bench`: everything is measured, and the fast ways compute what the plain ones do."""

import json

import torch

from blip3o_core.bench import stages
from blip3o_core.bench.timing import alternating, compared
from blip3o_core.sampling.flow_matching import flow_sigmas, sample_euler


def test_stages_are_measured_next_to_their_plain_baseline(cli):
    """Without the decoder's, which draw 1024 x 1024; tests/nano/test_bench.py has those."""
    wanted = [word for stage in ("load", "encode", "dit-step", "dit-sample", "ask-prefill", "ask-tokens") for word in ("--stage", stage)]
    result = cli("bench", *wanted, "--rounds", 1, "--warmup", 0, "--batch", 2, "--steps", 3, "--reference-steps", 8, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    found = {(one["stage"], one["variant"]): one for one in report["measurements"]}
    assert {stage for stage, _ in found} == {
        "load backbone", "load dit", "load decoder", "encode", "DiT step", "DiT sample", "ask prefill", "ask tokens",
    }  # fmt: skip
    for one in found.values():
        assert one["seconds"] > 0 and len(one["runs"]) == 1
    assert found["DiT step", "plain"]["ratio"] == 1 and found["DiT step", "blip3o"]["ratio"] > 0
    assert found["DiT sample", "euler 3"]["steps"] == 3 and found["DiT sample", "dpmpp_2m 12"]["error"] > 0
    assert found["load dit", "blip3o"]["nbytes"] > 100_000
    assert report["device"] == "cpu" and report["threads"] >= 1


def test_a_table_is_printed_row_by_row(cli):
    result = cli("bench", "--stage", "encode", "--rounds", 1, "--warmup", 0, "--batch", 1)
    lines = result.out.splitlines()
    assert result.code == 0 and lines[2].split() == ["stage", "variant", "batch", "steps", "seconds", "speed", "ratio", "error"]
    assert [line.split()[:3] for line in lines[3:]] == [["encode", "plain", "1"], ["encode", "blip3o", "1"]]
    assert cli("bench", "--batch", 0).code == 1


@torch.inference_mode()
def test_the_plain_way_gives_the_same_embedding(pipe, expected, relative_error):
    q = torch.cat([expected[f"query.{index}"] for index in range(2)])
    noise = expected["sample.noise"].expand(2, -1, -1, -1)
    plain = sample_euler(stages.plain_velocity(pipe, q), noise, flow_sigmas(10))
    assert relative_error(pipe.sample_embeddings(q, solver="euler", steps=10, guidance_scale=3.0, noise=noise), plain) <= 1e-5


def test_variants_take_turns_and_the_ratio_is_per_item():
    order = []
    runs = alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1, device=torch.device("cpu"))
    assert order == ["a", "b"] * 3 and [len(values) for values in runs.values()] == [2, 2]
    seconds = {"plain": (2.0, 4.0, 3.0), "own": (3.0,)}
    plain, own = compared("x", seconds, batch=2, unit="picture", items={"plain": 1, "own": 2}, plain="plain")
    assert plain.seconds == 3.0 and plain.ratio == 1 and own.ratio == 2.0
