"""Schedules, timesteps, solvers and noise, without a network."""

import json

import pytest
import torch

from blip3o_core import InputError
from blip3o_core.sampling.discrete_euler import leading_sigmas
from blip3o_core.sampling.flow_matching import flow_sigmas, truncate_timestep
from blip3o_core.sampling.noise import seeded_noise
from blip3o_core.sampling.solvers import SOLVERS

REFERENCE_TIMESTEPS_30 = [
    1000, 966, 933, 900, 866, 833, 800, 766, 733, 700, 666, 633, 600, 566, 533,
    500, 466, 433, 400, 366, 333, 300, 266, 233, 200, 166, 133, 100, 66, 33,
]  # fmt: skip


def test_timesteps_of_thirty_steps_are_those_of_the_reference():
    assert truncate_timestep(flow_sigmas(30)[:-1] * 1000).tolist() == REFERENCE_TIMESTEPS_30


def test_truncation_is_exact_integer_arithmetic_for_every_number_of_steps():
    for steps in range(1, 1001):
        exact = [1000 * (steps - i) // steps for i in range(steps)]
        assert truncate_timestep(flow_sigmas(steps)[:-1] * 1000).tolist() == exact, steps


def test_flow_sigmas_fall_from_one_to_zero():
    sigmas = flow_sigmas(7)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_shift_keeps_the_ends_and_bends_the_middle():
    plain, shifted = flow_sigmas(10), flow_sigmas(10, shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert shifted[0] == 1 and shifted[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match="steps="):
        flow_sigmas(steps)


@pytest.mark.parametrize("shift", [0, -1.0, float("inf"), float("nan")])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(InputError, match="shift="):
        flow_sigmas(10, shift)


@pytest.mark.parametrize("steps", [1, 2, 8, 30, 50, 333, 999])
def test_leading_sigmas_equal_those_of_the_library_scheduler(tiny_checkpoint, steps):
    from diffusers import EulerDiscreteScheduler

    config = tiny_checkpoint / "diffusion-decoder" / "scheduler" / "scheduler_config.json"
    scheduler = EulerDiscreteScheduler.from_config(json.loads(config.read_text("utf-8")))
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(leading_sigmas(steps), scheduler.sigmas, rtol=1e-6, atol=0)  # measured 0


def test_the_first_and_last_sigma_of_fifty_steps():
    sigmas = leading_sigmas(50)
    torch.testing.assert_close(sigmas[[0, -2]], torch.tensor([13.120416, 0.041314]), rtol=0, atol=1.5e-6)  # SPEC prints six decimals


@pytest.mark.parametrize("steps", [0, 1000, 1.0])
def test_decoder_steps_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match="steps="):
        leading_sigmas(steps)


def test_the_cosine_schedule_is_dense_at_both_ends_and_starts_at_its_strength():
    sigmas = flow_sigmas(12, schedule="cosine")
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas[6] == pytest.approx(0.5)
    steps = -sigmas.diff()
    assert steps.argmax() in (5, 6) and steps[0] < 0.02 and steps[-1] < 0.02
    assert flow_sigmas(6, strength=0.6, schedule="cosine")[0] == pytest.approx(0.6)
    with pytest.raises(InputError, match="schedule 'karras' is unknown. Use one of linear, cosine"):
        flow_sigmas(12, schedule="karras")


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_with_their_order(solver, order):
    """dx/dsigma = x * cos(4 sigma): halving the step divides the error by 2^order."""
    x0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = torch.exp((torch.sin(torch.tensor(0.0)) - torch.sin(torch.tensor(4.0, dtype=torch.float64))) / 4)

    def error(steps):
        return (SOLVERS[solver].sample(lambda x, sigma: x * torch.cos(4 * sigma.double()), x0, flow_sigmas(steps)) - exact).abs().item()

    assert 0.8 * 2**order <= error(40) / error(80) <= 1.25 * 2**order


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_report_every_step_with_an_estimate_of_the_result(solver):
    data, noise = torch.full((1, 2, 2, 2), 3.0), torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = []
    sample = SOLVERS[solver].sample
    result = sample(lambda x, sigma: noise - data, noise, flow_sigmas(4), lambda done, total, x0: seen.append((done, total, x0)))
    slack = dict(rtol=0, atol=1e-3 if solver == "dpmpp_2m" else 1e-5)  # it takes the noise for that of sigma 0.9999
    torch.testing.assert_close(result, data, **slack)  # a straight path: every solver is exact
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for _, _, estimate in seen:
        torch.testing.assert_close(estimate, data, **slack)


def test_noise_of_a_seed_does_not_depend_on_the_batch():
    batch = seeded_noise([5, 7, 5], (48, 8, 8))
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1:2], seeded_noise([7], (48, 8, 8)))
    assert not torch.equal(batch[0], batch[1])


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seeded_noise([1, 2], (4, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(InputError, match="is not an integer in 0"):
        seeded_noise([seed], (1,))
