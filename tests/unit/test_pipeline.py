"""The pipeline beyond single numbers: seeds and batches, work done once, cancel, arguments."""

from collections import Counter
from functools import partial

import pytest
import torch

from blip3o_core import Blip3oPipeline, InputError
from blip3o_core.models.layers import timestep_sinusoid
from blip3o_core.sampling.solvers import SOLVERS

SMALL = dict(width=64, height=64)


def test_the_same_seed_gives_the_same_picture_twice(pipe):
    first, second = (pipe.generate(["a cat"], seeds=[7], output_type="pt", **SMALL) for _ in range(2))
    assert torch.equal(first, second)


def test_a_seed_gives_the_same_picture_alone_and_inside_a_batch_of_four(pipe, psnr):
    prompts = ["a red fox", "a cat", "two blue birds on a wire in front of a house", "a"]
    batch = pipe.generate(prompts, seeds=[1, 7, 3, 4], output_type="pt", **SMALL)
    alone = pipe.generate(["a cat"], seeds=[7], output_type="pt", **SMALL)
    assert psnr(batch[1:2], alone) >= 60  # dB; measured 67 to 85: rounding of other matrix sizes
    assert psnr(batch[0:1], alone) < 30, "different prompts must differ, or the test can't fail"


def test_seeds_decide_the_picture(pipe, psnr):
    pictures = pipe.generate(["a cat"] * 2, seeds=[1, 2], output_type="pt", **SMALL)
    assert psnr(pictures[:1], pictures[1:]) < 30


def test_no_global_random_state_is_read_or_changed(pipe):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pipe.sample_embeddings(pipe.encode_prompt(["a cat"]), steps=3, seeds=[5])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, pipe.sample_embeddings(pipe.encode_prompt(["a cat"]), steps=3, seeds=[5]))


def count_calls(module: torch.nn.Module) -> Counter:
    """Calls of every layer of `module` by the last two parts of its name, from now on."""
    calls: Counter = Counter()
    for name, layer in module.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_what_is_constant_across_steps_is_projected_once(tiny_checkpoint):
    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    q = pipe.encode_prompt(["a cat", "a dog"])
    calls = count_calls(pipe.dit)
    pipe.sample_embeddings(q, steps=10, guidance_scale=3.0)
    layers = range(pipe.checkpoint.dit_config.num_layers)
    constant = ["caption_projection.linear_1", "caption_projection.linear_2", "time_caption_embed.caption_embedder.1"]
    constant += [f"layers.{i}.{name}" for i in layers for name in ("attn2.to_k", "attn2.to_v", "attn2.norm_k", "norm1_context")]
    assert {name: calls[name] for name in constant} == dict.fromkeys(constant, 2)  # condition and null, not 2 x 10 steps
    assert calls["layers.0.attn2.to_q"] == calls["layers.0.attn1.to_k"] == 10  # both branches in one call a step


def test_without_guidance_the_null_branch_does_not_run(tiny_checkpoint):
    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    q = pipe.encode_prompt(["a cat"])
    calls = count_calls(pipe.dit)
    z = pipe.sample_embeddings(q, steps=4, guidance_scale=1.0)
    assert calls["caption_projection.linear_1"] == 1
    both = pipe.sample_embeddings(q, steps=4, guidance_scale=1.0 + 1e-6)
    torch.testing.assert_close(z, both, rtol=0, atol=1e-4)


def test_the_null_embedding_is_sampled_once(pipe):
    stages = Counter()
    fresh = Blip3oPipeline(pipe.checkpoint, pipe.decoder_checkpoint, device=pipe.device, dtype=pipe.dtype)
    for seed in (1, 2):
        fresh.generate(["a cat"], seeds=[seed], steps=2, decoder_steps=2, on_step=lambda stage, *_: stages.update([stage]), **SMALL)
    assert stages == {"embedding": 4, "null embedding": 12, "picture": 4}


def test_a_condition_computed_once_gives_the_velocity_of_the_plain_call(pipe, expected):
    x, t, z = (expected[f"dit.1.{name}"] for name in "xtz")
    with torch.inference_mode():
        condition = pipe.dit.encode_condition(z)
        torch.testing.assert_close(pipe.dit.denoise(x, t, condition), pipe.dit(x, t, z), rtol=0, atol=1e-5)


def test_the_null_condition_is_that_of_64_zero_states(pipe, expected, relative_error):
    """Attention to tokens that are all the same is left out, for the null rows only."""
    x, t, z = (expected[f"dit.1.{name}"] for name in "xtz")
    with torch.inference_mode():
        plain = pipe.dit(torch.cat((x, x)), torch.cat((t, t)), torch.cat((torch.zeros_like(z), z)))
        condition = pipe.dit.encode_condition(z).after_null(pipe.dit.encode_null(z))
        found = pipe.dit.denoise(torch.cat((x, x)), torch.cat((t, t)), condition)
    assert relative_error(found, plain) <= 1e-6  # measured 4.3e-7
    assert condition.keys_values[0][0].shape[0] == len(x) and condition.null_values[0].shape[2] == 1


def test_all_solvers_end_at_the_same_embedding_when_steps_are_small(pipe, expected, relative_error):
    """Their orders are tested on a smooth field; this random network turns so fast in time that no order shows."""
    q, noise = expected["query.0"], expected["sample.noise"]
    ends = {solver: pipe.sample_embeddings(q, solver=solver, steps=1000, noise=noise, truncate_timesteps=False) for solver in SOLVERS}
    assert relative_error(ends["ab2"], ends["heun"]) <= 1e-4  # measured 1.2e-5
    assert relative_error(ends["euler"], ends["heun"]) <= 5e-3  # measured 1.5e-3
    assert relative_error(ends["dpmpp_2m"], ends["heun"]) <= 1e-4  # measured 1.9e-5


def test_solver_steps_and_schedule_are_those_that_belong_together(pipe, expected):
    assert pipe.sampler() == ("dpmpp_2m", 12, "cosine")
    assert pipe.sampler("euler") == ("euler", 30, "linear") and pipe.sampler(steps=20, schedule="linear") == ("dpmpp_2m", 20, "linear")
    q, noise = expected["query.0"], expected["sample.noise"]
    explicit = pipe.sample_embeddings(q, solver="dpmpp_2m", steps=12, schedule="cosine", noise=noise)
    assert torch.equal(pipe.sample_embeddings(q, noise=noise), explicit)


def test_outside_of_its_interval_there_is_no_guidance(pipe, expected, relative_error):
    q, noise = expected["query.0"], expected["sample.noise"]
    run = partial(pipe.sample_embeddings, q, steps=4, noise=noise)
    assert torch.equal(run(guidance_scale=3.0), run(guidance_scale=3.0, guidance_interval=(0.0, 1.0)))
    never = run(guidance_scale=3.0, guidance_interval=(0.0, 1e-4))  # below the last sigma that is not zero
    assert torch.equal(never, run(guidance_scale=1.0))
    assert relative_error(run(guidance_scale=3.0, guidance_interval=(0.2, 0.8)), never) > 0.01
    with pytest.raises(InputError, match=r"guidance_interval=0.8, 0.2 is not two sigmas"):
        run(guidance_interval=(0.8, 0.2))


def test_negatives_differ_and_zeros_need_no_sampling(pipe, psnr):
    z = pipe.sample_embeddings(pipe.encode_prompt(["a cat"]), steps=4, seeds=[7])
    arguments = dict(steps=4, seeds=[7], output_type="pt", **SMALL)
    null, zeros = (pipe.decode_embeddings(z, negative=name, **arguments) for name in ("null_prompt", "zeros"))
    assert torch.equal(null, pipe.decode_embeddings(z, **arguments)), "the null prompt is the default"
    assert torch.equal(null, pipe.decode_embeddings(z, negative=pipe.null_embedding(), **arguments))
    assert psnr(null, zeros) < 40


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 98), (66, 70)])
def test_pictures_that_are_not_square(pipe, width, height):
    picture = pipe.generate(["a cat"], seeds=[1], steps=2, decoder_steps=2, width=width, height=height)[0]
    assert picture.size == (width, height)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("stage", ["embedding", "null embedding", "picture"])
def test_cancel_stops_within_the_step_and_the_pipeline_goes_on_working(tiny_checkpoint, stage):
    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    reached = []

    def cancel_at_third(name, done, total):
        if name == stage:
            reached.append(done)
            if done == 3:
                raise Cancelled

    with pytest.raises(Cancelled):
        pipe.generate(["a cat"], seeds=[7], steps=5, decoder_steps=5, on_step=cancel_at_third, **SMALL)
    assert reached == [1, 2, 3]
    after = pipe.generate(["a cat"], seeds=[7], steps=5, decoder_steps=5, output_type="pt", **SMALL)
    fresh = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)
    assert torch.equal(after, fresh.generate(["a cat"], seeds=[7], steps=5, decoder_steps=5, output_type="pt", **SMALL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(decoder_steps=1000), "decoder steps=1000"),
        (dict(solver="rk45"), "solver 'rk45' is unknown. Use one of dpmpp_2m, euler, heun, ab2"),
        (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
        (dict(decoder_guidance_scale=-1), "guidance_scale=-1"),
        (dict(width=65), "width=65 is not a multiple of 2"),
        (dict(height=8192), "height=8192"),
        (dict(seeds=[1, 2]), "2 seeds for 1 prompts"),
        (dict(seeds=[-1]), "seed -1"),
        (dict(negative="ugly"), "pass an embedding, or one of null_prompt, zeros"),
        (dict(output_type="jpg"), "output_type 'jpg' is unknown"),
    ],
)
def test_arguments_out_of_range_are_refused_before_weights_are_loaded(tiny_checkpoint, arguments, message):
    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(InputError, match=message):
        pipe.generate(["a cat"], **{**SMALL, **arguments})
    assert pipe._backbone is None and pipe._dit is None and pipe._decoder is None


def test_tensors_of_other_shapes_are_refused(pipe):
    with pytest.raises(InputError, match="query states have shape"):
        pipe.sample_embeddings(torch.zeros(1, 64, 63))
    with pytest.raises(InputError, match="an embedding has shape"):
        pipe.decode_embeddings(torch.zeros(1, 47, 8, 8), **SMALL)
    with pytest.raises(InputError, match="noise has shape"):
        pipe.sample_embeddings(torch.zeros(1, 64, 64), noise=torch.zeros(2, 48, 8, 8))
    with pytest.raises(InputError, match="negative holds 3 embeddings for 2 pictures"):
        pipe.decode_embeddings(torch.zeros(2, 48, 8, 8), negative=torch.zeros(3, 48, 8, 8), **SMALL)


def test_an_overflow_is_an_error_that_names_the_precision(tiny_checkpoint):
    from blip3o_core import Blip3oError

    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype="float16")
    with pytest.raises(Blip3oError, match="overflowed to nan or infinity in torch.float16. Use dtype bfloat16"):
        pipe.sample_embeddings(torch.full((1, 64, 64), 6e4), steps=2)


def test_an_unknown_device_or_dtype_is_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="device 'warp' can't be used here"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="warp")
    with pytest.raises(InputError, match="dtype 'int4' is unknown"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype="int4")


def test_the_schedule_reaches_the_network_with_the_shift(pipe):
    """Shift changes the visited timesteps, not the number of steps."""
    seen = []
    handle = pipe.dit.time_caption_embed.timestep_embedder.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        pipe.sample_embeddings(torch.zeros(1, 64, 64), solver="euler", steps=4, shift=3.0, guidance_scale=1.0)
    finally:
        handle.remove()
    integers = torch.tensor([1000.0, 900.0, 750.0, 500.0])  # 1000 * 3 s / (1 + 2 s) for s = 1, 3/4, 1/2, 1/4
    torch.testing.assert_close(torch.cat(seen), timestep_sinusoid(integers, 256))
