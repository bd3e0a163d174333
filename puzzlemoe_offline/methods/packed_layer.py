"""A layer whose experts were merged in pairs: its words, what is left of each expert, and what that lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.model.tensors import dense_tensors, experts_name
from puzzlemoe_offline.pairing.partners import LayerPairing
from puzzlemoe_offline.relative_error import relative_error
from puzzlemoe_offline.words.pack import Losses, PackedPair
from puzzlemoe_vllm.format.codes import PairCode
from puzzlemoe_vllm.format.layout import steps_name, words_name


@dataclass(frozen=True)
class PackedLayer:
    """A layer after merging, under the new expert ids of `pairing`.  losses: of each pair."""

    pairing: LayerPairing
    pairs: list[PackedPair]
    losses: list[Losses]
    dense: list[Expert]
    code: PairCode

    def expert(self, source_id: int) -> Expert:
        """The reconstructed bf16 weights of the expert that the source calls `source_id`."""
        new = self.pairing.order.index(source_id)
        if new >= self.pairing.merged:
            return self.dense[new - self.pairing.merged]
        return Expert(*(self.code.decode(matrix.words, new & 1, matrix.steps) for matrix in self.pairs[new >> 1]))

    def without(self, pairing: LayerPairing, source: Callable[[int], Expert]) -> PackedLayer:
        """The same with fewer pairs, those of `pairing`; source: the experts by the source's ids."""
        kept = [self.pairing.pairs.index(pair) for pair in pairing.pairs]
        return PackedLayer(
            pairing,
            [self.pairs[pair] for pair in kept],
            [self.losses[pair] for pair in kept],
            [source(number) for number in pairing.order[pairing.merged :]],
            self.code,
        )

    @property
    def pair_bytes(self) -> int:
        """Of one pair's words and steps; 0 without pairs."""
        matrices = self.pairs[0] if self.pairs else ()
        steps = [matrix.steps.nbytes for matrix in matrices if matrix.steps is not None]
        return sum(matrix.words.nbytes for matrix in matrices) + sum(steps)

    @property
    def weight_error(self) -> list[float | None]:
        """||W - W'|| / ||W|| of all experts in pairs, per projection."""
        error = sum((losses.error.sum(dim=0) for losses in self.losses), torch.zeros(3))
        energy = sum((losses.energy.sum(dim=0) for losses in self.losses), torch.zeros(3))
        return [relative_error(*both) for both in zip(error.tolist(), energy.tolist(), strict=True)]

    @property
    def expert_weight_error(self) -> list[list[float | None]]:
        """The same of every expert, by the source's ids."""
        errors: list[list[float | None]] = [[0.0] * len(PROJECTIONS) for _ in self.pairing.order]
        for pair, losses in zip(self.pairing.pairs, self.losses, strict=True):
            for position, expert in enumerate(pair):
                errors[expert] = losses.relative(position)
        return errors

    def tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """Words, steps and dense weights by name."""
        experts, tensors = experts_name(checkpoint, layer), {}
        for pair, matrices in enumerate(self.pairs):
            for name, matrix in zip(checkpoint.family.projections, matrices, strict=True):
                tensors[words_name(experts, 2 * pair, name)] = matrix.words
                if matrix.steps is not None:
                    tensors[steps_name(experts, 2 * pair, name)] = matrix.steps
        for number, expert in enumerate(self.dense, self.pairing.merged):
            tensors |= dense_tensors(checkpoint, layer, number, expert)
        return tensors
