"""Runs from every form of data learn; a sample's loss does not depend on its neighbours in the batch."""

import itertools

import pytest
import torch

from blip3o_core.train.build import build_model
from blip3o_core.train.datasets import validation_examples
from blip3o_core.train.frozen import FrozenNetworks
from blip3o_core.train.noise import Draw
from blip3o_core.train.run import open_run, run_training

LORA = {"rank": 16}
FAST = {"learning_rate": 1e-2, "warmup_steps": 5}


def validation(logged, folder) -> list[dict[str, float]]:
    return [line["losses"] for line in logged(folder, "validation")]


@pytest.mark.parametrize("form", ["folder", "jsonl", "tars"])
def test_200_steps_of_lora_lower_the_loss_on_fixed_noise(form, material, train_config, logged, tmp_path):
    config = train_config(getattr(material, form), train={"steps": 200, "batch_size": 4}, lora=LORA, optimizer=FAST,
                          cache={"enabled": True, "folder": str(tmp_path / "cache")}, validation={"every": 200, "samples": 8},
                          output={"log_every": 50})  # fmt: skip
    assert run_training(config) == 0
    before, after = (losses["text_to_image"] for losses in validation(logged, tmp_path / "run"))
    print(form, before, after, after / before)
    assert after < 0.75 * before
    train = [line["loss"] for line in logged(tmp_path / "run", "train")]
    assert train[-1] < train[0]
    assert (tmp_path / "run" / "blip3o_lora.safetensors").is_file()


def test_five_tasks_are_learned_in_one_run(material, train_config, logged, tmp_path):
    config = train_config(material.five_tasks, train={"steps": 60, "batch_size": 5}, optimizer=FAST,
                          lora={**LORA, "parts": ["dit", "language_model"], "latent_queries": True},
                          validation={"every": 60, "samples": 4}, output={"log_every": 20})  # fmt: skip
    assert run_training(config) == 0
    before, after = validation(logged, tmp_path / "run")
    print({task: round(after[task] / before[task], 3) for task in before})
    assert set(before) == {"text_to_image", "reconstruct", "edit", "understand", "text"}
    for task in before:
        assert after[task] < 0.8 * before[task], task


@pytest.fixture
def examples_and_model(material, train_config):
    config = train_config(material.five_tasks, lora={"parts": ["dit", "language_model"], "latent_queries": True})
    opened = open_run(config, "fp32")
    frozen = FrozenNetworks(opened.sources, device=torch.device("cpu"), dtype=torch.float32)
    model = build_model(config, opened.sources, frozen, opened.sets.tasks, precision="fp32")
    model.set_training(True)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trained().values():  # adapters begin as zeros, which would hide their part
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return validation_examples(opened.sets, 2), model


@pytest.mark.parametrize("batch_size", [2, 5, 10])
def test_the_loss_of_a_sample_is_the_same_alone_and_in_any_batch(examples_and_model, batch_size, relative_error):
    examples, model = examples_and_model
    draws = [Draw((0, "train", index)) for index in range(len(examples))]
    with torch.no_grad():
        alone = torch.cat([model([example], [draw]) for example, draw in zip(examples, draws, strict=True)])
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(batch_size)).tolist()  # tasks are mixed
        together = torch.empty_like(alone)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            together[chosen] = model([examples[index] for index in chosen], [draws[index] for index in chosen])
    assert {example.task for example in examples} == {"text_to_image", "reconstruct", "edit", "understand", "text"}
    error = ((together - alone).abs() / alone).max().item()
    print(batch_size, error)
    assert error <= 1e-6


def test_losses_of_one_task_are_those_of_a_mixed_batch_and_so_are_gradients(examples_and_model):
    examples, model = examples_and_model
    draws = [Draw((0, "train", index)) for index in range(len(examples))]
    parameters = list(model.trained().values())
    mixed = model(examples, draws)
    gradients = torch.autograd.grad(mixed.sum(), parameters)
    losses, sums = torch.empty_like(mixed), None
    for _, group in itertools.groupby(range(len(examples)), key=lambda index: examples[index].task):
        chosen = list(group)
        own = model([examples[index] for index in chosen], [draws[index] for index in chosen])
        losses[chosen] = own.detach()
        parts = torch.autograd.grad(own.sum(), parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    error = ((losses - mixed).abs() / mixed).max().item()
    together, apart = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, sums))
    gradient_error = ((together - apart).norm() / together.norm()).item()
    print(error, gradient_error)
    assert error <= 1e-6
    assert gradient_error <= 1e-5
