"""The SDXL decoder with DPM-Solver++: fewer steps to the same picture."""

import json

import pytest
import torch
from PIL import Image

from blip3o_core import Blip3oPipeline
from blip3o_core.errors import InputError
from blip3o_core.models.sdxl import FEWER_STEPS, make_scheduler
from blip3o_core.variants.blip3o import NANO_FOLDER

EXACT_STEPS = 250


@pytest.fixture(scope="module")
def latents():
    """latents(scheduler, steps, guidance_scale) of two embeddings that nano sampled, from the same noise."""
    pipes = {name: Blip3oPipeline.from_pretrained(NANO_FOLDER, device="cpu", decoder_scheduler=name) for name in ("euler", "dpmsolver++")}
    z = pipes["euler"].sample_embeddings(pipes["euler"].encode_prompt(["a red circle left of a blue square", "a green ring"]), seeds=[1, 2])

    def sample(name: str, steps: int, guidance_scale: float) -> torch.Tensor:
        return pipes[name].decode_embeddings(z, steps=steps, guidance_scale=guidance_scale, seeds=[1, 2], output_type="latent")

    return sample


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


def test_half_of_the_steps_are_as_close_to_the_exact_solution(latents):
    exact = latents("euler", EXACT_STEPS, 3.0)
    assert error(latents("dpmsolver++", 25, 3.0), exact) <= 1.1 * error(latents("euler", 50, 3.0), exact)


def test_without_guidance_a_fifth_is_enough(latents):
    exact = latents("euler", EXACT_STEPS, 1.0)
    assert error(latents("dpmsolver++", 10, 1.0), exact) <= error(latents("euler", 50, 1.0), exact)


def test_it_is_of_second_order_in_steps_even_in_the_logarithm():
    config = Blip3oPipeline.from_pretrained(NANO_FOLDER, device="cpu").decoder_checkpoint.scheduler_config
    scheduler = make_scheduler("dpmsolver++", config)
    scheduler.set_timesteps(10)
    steps = scheduler.sigmas[:-1].log().diff()
    assert scheduler.config.solver_order == 2 and scheduler.sigmas[-1] == 0
    assert torch.allclose(steps[:-1], steps[0].expand(len(steps) - 1), atol=0.02), "even in the logarithm"


def test_on_the_command_line_it_has_its_own_number_of_steps(cli, tmp_path):
    result = cli("generate", "a cat", "--decoder-scheduler", "dpmsolver++", "--steps", 1, "--width", 64, "--height", 64,
                 "--negative", "zeros", "--output", tmp_path / "a.png", "--json")  # fmt: skip
    assert result.code == 0, result.err
    recipe = json.loads(result.out)
    assert (recipe["decoder_scheduler"], recipe["decoder_steps"]) == ("dpmsolver++", FEWER_STEPS)
    with Image.open(tmp_path / "a.png") as picture:
        assert json.loads(picture.text["blip3o"])["decoder_scheduler"] == "dpmsolver++"


def test_an_unknown_one_is_refused(tiny_checkpoint):
    with pytest.raises(InputError, match="the scheduler 'heun' of the decoder is unknown. Use one of euler, dpmsolver"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", decoder_scheduler="heun")
