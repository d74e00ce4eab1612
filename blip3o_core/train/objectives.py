"""Tasks -> losses: flow matching over CLIP embeddings for drawing, cross-entropy for writing.

An objective is a callable (see `model.Objective`) made from the options of a run; a new one is a function here or in a file of its
own, and a line in `build_objectives`. Source of the published ones: arXiv:2505.09568, sec. 3, and the released training code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.prepare import Example
from ..data.sample import GENERATION_TASKS, WRITING_TASKS
from ..models.eva_clip import EMBEDDING_GRID
from .autoencoding import autoencoding_objective
from .config import ObjectiveOptions
from .contrastive import contrastive_objective
from .denoising import denoising_objective
from .local_attention import condition_attention_loss
from .losses import answer_cross_entropy, embedding_regression, flow_matching
from .model import Objective, TrainingModel
from .noise import Draw, counted_positions, flow_draws, repeated
from .segmentation import query_label_losses, segmentation_objective

UNIFIED_PARTS = {"dit", "latent_queries", "backbone"}
TRAINS = {
    "text_to_image": UNIFIED_PARTS, "edit": UNIFIED_PARTS | {"vision"}, "reconstruct": UNIFIED_PARTS | {"vision"},
    "understand": {"backbone", "vision"}, "text": {"backbone"}, "decode": {"decoder"}, "contrast": {"clip"},
    "autoencode": {"vae", "vae_decoder"}, "segment": {"clip", "vision", "backbone"},
}  # fmt: skip
"""Which parts the loss of a task reaches."""


def build_objectives(options: ObjectiveOptions, tasks: Sequence[str]) -> dict[str, Objective]:
    """The objective of each task; tasks that share one run as one batch."""
    makers = {
        flow_matching_objective: GENERATION_TASKS, cross_entropy_objective: WRITING_TASKS, denoising_objective: ("decode",),
        contrastive_objective: ("contrast",), autoencoding_objective: ("autoencode",), segmentation_objective: ("segment",),
    }  # fmt: skip
    made: dict[str, Objective] = {}
    for maker, own_tasks in makers.items():
        wanted = [task for task in own_tasks if task in tasks]
        if wanted:
            objective = maker(options)
            made.update(dict.fromkeys(wanted, objective))
    return made


def flow_matching_objective(options: ObjectiveOptions) -> Objective:
    """CLIP + flow matching: the DiT learns the velocity noise - embedding, given the query states of the prompt.

    With `regression_weight` also CLIP + MSE: the state of query i is mapped to token i, here only to teach the language side, like the
    labels of `label_weight`; with `local_attention_weight` token i of the DiT learns to look at the state of query i.
    """

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        states = model.query_states(examples)  # (B, Q, H)
        flows, lessons, weight = options.draws_per_sample > 0, 0.0, _token_weights(examples, options.changed_weight, states.device)
        if flows or model.embedding_head is not None:
            data = model.targets(examples)  # (B, C, 8, 8) float32
        if model.embedding_head is not None:
            lessons = options.regression_weight * embedding_regression(model.embedding_head(states), data, weight)  # (B,)
        if model.query_label_head is not None:
            lessons = lessons + options.label_weight * query_label_losses(model.query_label_head(states), examples, weight)
        if not flows:
            return lessons
        if options.local_attention_weight:
            lessons = lessons + options.local_attention_weight * condition_attention_loss(model.dit, states)
        draws = repeated(draws, options.draws_per_sample)
        rounds = len(draws) // len(examples)
        data, states = data.repeat(rounds, 1, 1, 1), states.repeat(rounds, 1, 1)
        drawn = flow_draws(draws, data.shape[1:], timesteps=options.timesteps, logit_mean=options.logit_mean,
                           logit_std=options.logit_std, condition_dropout=options.condition_dropout)  # fmt: skip
        states = states * drawn.kept.to(states)[:, None, None]
        found = flow_matching(lambda x, timestep: model.velocity(x, timestep, states), data, drawn.noise.to(data), drawn.u.to(data),
                              shift=options.shift, weight=None if weight is None else weight.repeat(rounds, 1))  # fmt: skip
        return found.unflatten(0, (rounds, -1)).mean(dim=0) + lessons

    return losses


def _token_weights(examples: Sequence[Example], changed_weight: float, device: torch.device) -> Tensor | None:
    """(B, 64), or None if all of them are 1."""
    if changed_weight == 1:
        return None
    same = torch.zeros(EMBEDDING_GRID**2, dtype=torch.bool)
    changed = torch.stack([same if example.changed is None else example.changed for example in examples]).to(device)
    return 1 + (changed_weight - 1) * changed.float()


def cross_entropy_objective(options: ObjectiveOptions) -> Objective:
    """Next-token prediction of the assistant's turns, averaged over each conversation."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        return answer_cross_entropy(*model.answer_logits(examples, counted_positions(draws, options.counted_positions)))

    return losses
