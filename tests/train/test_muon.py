"""Muon against its definition: orthogonal updates for hidden matrices, torch's AdamW for everything else, resumable."""

import pytest
import torch
from torch import nn

from blip3o_core.train.config import OptimizerOptions
from blip3o_core.train.muon import Muon, is_hidden_matrix, orthogonalised
from blip3o_core.train.optimizer import build_optimizer
from blip3o_core.train.run import run_training

from .training_samples import training_config, write_data

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 48, 32), (1, 16, 16)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape):
    matrices = seeded(*shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalised(1000 * matrices).float()
    values = torch.linalg.svdvals(found)
    assert values.quantile(0.05) > 0.5 and values.max() < 1.3
    nearest = left @ right
    assert torch.nn.functional.cosine_similarity(found.flatten(1), nearest.flatten(1)).min() > 0.95


def test_one_step_by_hand():
    weight = nn.Parameter(seeded(8, 32))
    before, gradient = weight.detach().clone(), seeded(32, 8).T.contiguous()
    weight.grad = gradient.clone()
    Muon({"layers.0.weight": weight}, **SETTINGS).step()
    nesterov = gradient + 0.95 * (0.05 * gradient - gradient)
    update = orthogonalised(nesterov[None])[0].float()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 32**0.5 * update)


def test_a_convolution_is_a_matrix_with_a_row_per_output():
    kernel, gradient = seeded(8, 4, 3, 3), seeded(3, 3, 4, 8).permute(3, 2, 0, 1).contiguous()
    parameters = {"resnets.0.conv1.weight": kernel.clone(), "layers.0.weight": kernel.flatten(1).clone()}
    parameters = {name: nn.Parameter(value) for name, value in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = gradient.view(parameter.shape)
    Muon(parameters, **SETTINGS).step()
    convolution, matrix = (parameter.detach() for parameter in parameters.values())
    torch.testing.assert_close(convolution.flatten(1), matrix)
    assert not torch.equal(convolution, kernel)


def test_vectors_embeddings_heads_and_outer_convolutions_get_adamw_steps():
    named = {"norm.weight": seeded(16), "backbone.embed_tokens.weight": seeded(10, 4), "embedding_head.weight": seeded(6, 4),
             "backbone.latent_queries": seeded(1, 8, 4), "unet.conv_in.weight": seeded(4, 4, 3, 3)}  # fmt: skip
    assert not any(is_hidden_matrix(name, tensor) for name, tensor in named.items())
    ours = {name: nn.Parameter(tensor.clone()) for name, tensor in named.items()}
    theirs = {name: nn.Parameter(tensor.clone()) for name, tensor in named.items()}
    optimizers = Muon(ours, **SETTINGS), torch.optim.AdamW(theirs.values(), **SETTINGS)
    for step in range(3):
        for own in (ours, theirs):
            for parameter in own.values():
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
        for optimizer in optimizers:
            optimizer.step()
    for name in named:
        torch.testing.assert_close(ours[name], theirs[name])


def test_both_kinds_follow_the_learning_rate():
    named = {"layers.0.weight": nn.Parameter(seeded(4, 4)), "norm.weight": nn.Parameter(seeded(4))}
    optimizer = build_optimizer(OptimizerOptions(name="muon", learning_rate=0.5), named, torch.device("cpu"))
    assert [group["orthogonal"] for group in optimizer.param_groups] == [True, False]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_a_run_goes_on_where_it_was(data, tmp_path, everything):
    words = ["optimizer.name=muon", "optimizer.learning_rate=1e-3", "optimizer.schedule=constant", "validation.every=0",
             "output.save_every=2", "train.method=full", 'train.parts=["dit","latent_queries"]']  # fmt: skip
    assert run_training(training_config(data, tmp_path / "whole", ["text_to_image"], *words, "train.steps=4")) == 0
    assert run_training(training_config(data, tmp_path / "parts", ["text_to_image"], *words, "train.steps=2")) == 0
    assert run_training(training_config(data, tmp_path / "parts", ["text_to_image"], *words, "train.steps=4", "output.resume=latest")) == 0
    whole, parts = everything(tmp_path / "whole"), everything(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
