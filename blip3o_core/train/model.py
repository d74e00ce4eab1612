"""Everything that gradients pass through, as one module: what DDP and FSDP wrap. forward: examples -> losses."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.prepare import Example
from ..models.eva_clip import EvaClip
from ..models.nextdit import NextDiT
from ..models.qwen2_5_vl import Backbone, VisionTower
from ..models.qwen_positions import multimodal_positions
from ..pipelines.language import merged_grids
from .cpu_attention import LENGTH_MULTIPLE, training_attend
from .frozen import FrozenNetworks, image_features, query_states
from .noise import Draw

Objective = Callable[["TrainingModel", Sequence[Example], Sequence[Draw]], Tensor]
"""Some examples of its tasks and the random numbers of each -> their losses (n,) float32. A sample's loss depends on that sample
alone (contrastive losses excepted), so batches of any composition train the same."""


class TrainingModel(nn.Module):
    """The networks of one run. Those that only frozen stages need are in `frozen`, outside of the module tree.

    Attributes that a run has no use for are None. `objectives`: task -> loss.
    """

    def __init__(
        self, frozen: FrozenNetworks, objectives: Mapping[str, Objective], *, image_pad_id: int, dit: NextDiT | None = None,
        backbone: Backbone | None = None, vision_tower: VisionTower | None = None, output_head: nn.Module | None = None,
        vision_encoder: EvaClip | None = None, unet: nn.Module | None = None, vae: nn.Module | None = None,
        text_tower: nn.Module | None = None, segmentation_head: nn.Module | None = None,
        embedding_head: nn.Module | None = None, query_label_head: nn.Module | None = None, thumbnail_head: nn.Module | None = None,
        checkpoint_layers: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dit, self.backbone, self.vision_tower, self.output_head = dit, backbone, vision_tower, output_head
        self.vision_encoder, self.unet, self.vae, self.text_tower = vision_encoder, unet, vae, text_tower
        self.segmentation_head, self.embedding_head, self.query_label_head = segmentation_head, embedding_head, query_label_head
        self.thumbnail_head = thumbnail_head
        self.frozen, self.objectives = frozen, dict(objectives)
        self.image_pad_id = image_pad_id
        self.checkpoint_layers = checkpoint_layers
        self.active: tuple[nn.Module, ...] = ()  # what is in training mode while training

    @property
    def device(self) -> torch.device:
        return self.frozen.device

    def forward(self, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        """Losses (B,) float32, unweighted, in the order of the examples."""
        by_task: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_task.setdefault(example.task, []).append(index)
        groups: dict[int, tuple[Objective, list[int]]] = {}
        for task, indices in by_task.items():  # tasks of one objective run as one batch
            groups.setdefault(id(self.objectives[task]), (self.objectives[task], []))[1].extend(indices)
        order, losses = [], []
        for objective, indices in groups.values():
            losses.append(objective(self, [examples[index] for index in indices], [draws[index] for index in indices]).float())
            order += indices
        return torch.cat(losses)[torch.tensor(order).argsort().to(losses[0].device)]

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimiser changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def set_training(self, training: bool) -> None:
        """Frozen parts stay in eval mode; dropout and recomputation are on only in `active`."""
        self.eval()
        for module in self.active:
            module.train(training)

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Embeddings of the pictures to be drawn (B, C, 8, 8) float32, cached or computed."""
        missing = [example for example in examples if example.target is None]
        computed = iter(self.frozen.embeddings(torch.stack([example.target_pixels for example in missing])) if missing else ())
        return torch.stack([next(computed) if example.target is None else example.target.to(self.device, torch.float32)
                            for example in examples])  # fmt: skip

    def query_states(self, examples: Sequence[Example]) -> Tensor:
        """States of the learned queries (B, Q, H), with gradients if the language side trains."""
        if self.backbone is not None:
            dtype = self.language_dtype
            return query_states(self.backbone, examples, self.image_features(examples), self.image_pad_id, self.device, dtype)
        missing = [example for example in examples if example.states is None]
        computed = iter(self.frozen.query_states(missing) if missing else ())
        return torch.stack([next(computed) if example.states is None else example.states.to(self.device, torch.float32)
                            for example in examples])  # fmt: skip

    def image_features(self, examples: Sequence[Example]) -> list[Tensor | None]:
        """Vision features of each example's pictures, with gradients if the vision tower trains."""
        if self.vision_tower is None:
            return self.frozen.image_features(examples)
        return image_features(lambda: self.vision_tower, examples, self.device, next(self.vision_tower.parameters()).dtype)

    def velocity(self, x: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """The DiT, its layers recomputed in the backward pass if asked for."""
        attend = training_attend(self.device)
        if not (self.checkpoint_layers and torch.is_grad_enabled()):
            return self.dit(x, timestep, states, attend=attend)  # as a call: what torch.compile replaces
        return self.dit.denoise(x, timestep, self.dit.encode_condition(states), attend=attend, run_layer=_recomputed)

    def image_states(self, examples: Sequence[Example], counted: Sequence[bool]) -> list[Tensor]:
        """States of the language model at the cells of each example's pictures (cells, H)."""
        states = self._conversation_states(examples, counted)
        cells = [torch.tensor([token == self.image_pad_id for token in example.ids], device=self.device) for example in examples]
        return [states[index, : len(own)][own] for index, own in enumerate(cells)]

    def answer_logits(self, examples: Sequence[Example], counted: Sequence[bool]) -> tuple[Tensor, Tensor, list[int]]:
        """Logits only where an answer is learned -> (n, vocabulary), the right ids (n,), and how many each example has."""
        states = self._conversation_states(examples, counted)
        chosen, ids, counts = [], [], []
        for index, example in enumerate(examples):
            learned = [at for at, is_learned in enumerate(example.learned) if is_learned]
            chosen.append(states[index, torch.tensor(learned, device=self.device) - 1])  # the token before predicts it
            ids += [example.ids[at] for at in learned]
            counts.append(len(learned))
        return self.output_head(torch.cat(chosen)), torch.tensor(ids, device=self.device), counts

    def _conversation_states(self, examples: Sequence[Example], counted: Sequence[bool]) -> Tensor:
        """(B, N, H), N from the longest.

        Positions of text and image cells as in understanding (M-RoPE), or counted up as in drawing for the examples that are `counted`;
        padding behind each row needs no mask.
        """
        rows, positions = [], []
        for example, features, counts_up in zip(examples, self.image_features(examples), counted, strict=True):
            rows.append(self.backbone.embed(example.ids, device=self.device, dtype=self.language_dtype, image_features=features,
                                            image_token_id=self.image_pad_id))  # fmt: skip
            grids = [] if example.grid_thw is None or counts_up else merged_grids(example.grid_thw)
            positions.append(multimodal_positions(example.ids, self.image_pad_id if grids else None, grids)[0])
        longest = max(map(len, rows))
        longest += -longest % LENGTH_MULTIPLE
        padded = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])  # (B, N, H)
        padded_positions = torch.stack([nn.functional.pad(own, (0, longest - own.shape[1])) for own in positions], dim=1)  # (3, B, N)
        return self.backbone.decode(padded, padded_positions.to(self.device))

    @property
    def language_dtype(self) -> torch.dtype:
        """Of the backbone's weights."""
        return self.backbone.language_model.embed_tokens.weight.dtype


def _recomputed(index: int, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return checkpoint(layer, hidden, use_reentrant=False)
