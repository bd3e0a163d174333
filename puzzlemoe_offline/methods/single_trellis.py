"""Trellis words of one expert each: what two experts in a word are worth is what this loses more than pairs.

All is as in a pair's words - code, steps, compensation, neurons that matter beside neurons that do not - but that a
word's two weights are neighbours in a row of one expert.  So an expert gets the bits of its own weights, whatever
another needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.statistics import ExpertStatistics
from puzzlemoe_offline.methods.base import LayerMethod, MethodError, NewLayer, dense_layer, expert_statistics
from puzzlemoe_offline.methods.rounding import group_of
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.words.compensate import fit_neighbours
from puzzlemoe_offline.words.factors import MomentsError, inverse_factors
from puzzlemoe_offline.words.neurons import face_itself
from puzzlemoe_offline.words.pack import pairs_at_once
from puzzlemoe_vllm.format.codes import TrellisCode, UnencodableWeight, get_code
from puzzlemoe_vllm.format.codes.trellis import TILE_COLUMNS

COLUMNS = 2 * TILE_COLUMNS
"""Of a matrix, in a tile of words."""


def single_words(code: TrellisCode, matrices: list[Tensor], factors: Tensor, rows: Tensor) -> Tensor:
    """What matrices [N, K] are in words of their own, bf16 [matrices, N, K]; factors, rows: as in `fit_neighbours`."""
    group = group_of(matrices[0].shape[1] // 2)
    decoded = []
    for packed in fit_neighbours(code, matrices, factors, group, rows):
        positions = [code.decode(packed.words, position, packed.steps) for position in (0, 1)]
        decoded.append(torch.stack(positions, dim=-1).flatten(1))
    return torch.stack(decoded)


@dataclass(frozen=True)
class SingleTrellis(LayerMethod):
    """A trellis code's words, two weights of one expert in each; bits: of a word, twice those of a weight."""

    bits: int

    @property
    def code(self) -> TrellisCode:
        """The code with words of so many bits."""
        code = get_code(f"trellis{self.bits}")
        assert isinstance(code, TrellisCode)
        return code

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the experts' matrices are no whole tiles."""
        super().check(checkpoint)
        hidden, intermediate = checkpoint.expert_sizes
        if hidden % COLUMNS or intermediate % COLUMNS:
            raise MethodError(
                f"{checkpoint.folder}: hidden size {hidden} and intermediate size {intermediate} are not multiples of "
                f"{COLUMNS}, the columns of a tile with two in a word; gptq-int4, gptq-int3 and gptq-int2 need 32"
            )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Half a word's and its step's."""
        hidden, intermediate = checkpoint.expert_sizes
        of_hidden, of_intermediate = (self.code.bits_per_pair(group_of(size // 2)) for size in (hidden, intermediate))
        return (2 * of_hidden + of_intermediate) / 3 / 2

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> ExpertStatistics:
        """Second moments of every expert's own tokens."""
        return expert_statistics(layer, passes, moments=True, by_router=True)

    def merge(self, layer: SourceLayer, seen: ExpertStatistics) -> NewLayer:
        """Every expert, with its neurons in another order; without compensation where it saw few tokens."""
        sizes, device = layer.checkpoint.expert_sizes, torch.device(layer.device)
        at_once = 2 * pairs_at_once(self.code, max(sizes), min(sizes), device)
        experts: list[Expert] = []
        for start in range(0, layer.checkpoint.experts, at_once):
            ids = range(start, min(start + at_once, layer.checkpoint.experts))
            experts += self._coded(layer, ids, seen)
        return dense_layer(layer, experts)

    def _coded(self, layer: SourceLayer, ids: range, statistics: ExpertStatistics) -> list[Expert]:
        """Raises UnencodableWeight or MomentsError naming the experts and the projection."""
        faced = [face_itself(layer.expert(number), number, statistics) for number in ids]
        matrices = []
        for index, projection in enumerate(PROJECTIONS):
            weights = [its.expert.matrices[index] for its in faced]
            rows = torch.stack([its.rows[index] for its in faced])
            try:
                if projection != "up":  # which sees what gate does
                    factors = inverse_factors([its.inputs[index] for its in faced])
                matrices.append(single_words(self.code, weights, factors, rows))
            except (UnencodableWeight, MomentsError) as error:
                which = f"experts {ids[0]} to {ids[-1]}"
                raise type(error)(f"layer {layer.index}, {which}, {projection} projection: {error}") from None
        return [Expert(*its) for its in zip(*matrices, strict=True)]
