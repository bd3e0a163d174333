"""The neurons of a pair's experts: which stand side by side, and how much their rows count.

Neuron i is row i of gate and up and column i of down, and the order is free: an expert whose neurons change places is
the same expert.  Words of a trellis share a pair's bits by need, which saves most where a weight that matters stands
beside one that does not.  So the neurons of one expert are put in falling order of what they matter, and its partner's
in rising order; and the rows of gate and up count by that as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ExpertStatistics, ProjectionInputs, projection_inputs
from puzzlemoe_offline.model.expert import Expert

POWER = 0.5
"""Of a row's importance: what a neuron's error does to the output is known roughly."""

LEAST = 0.01
"""Importance, relative to the mean, of a row that no calibration token needs."""


def neuron_energies(expert: Expert, seen: ProjectionInputs) -> Tensor:
    """Energy of what each neuron adds to an expert's output, float32 [I]; seen: what the down projection saw."""
    return seen.norms.square() * expert.down.float().square().sum(dim=0)


def facing_orders(energies: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Orders of two experts' neurons, int64 [I]: the strongest of one beside the weakest of the other."""
    return energies[0].argsort(descending=True, stable=True), energies[1].argsort(stable=True)


def facing_order(energies: Tensor) -> Tensor:
    """The same for one expert whose neighbouring neurons share words, int64 [I], I even: the strongest beside the
    weakest, the second strongest beside the second weakest."""
    order = energies.argsort(descending=True, stable=True)
    return torch.stack([order, order.flip(0)], dim=1)[: len(order) // 2].flatten()


def _reordered(expert: Expert, order: Tensor) -> Expert:
    """The same expert with its neurons in another order."""
    return Expert(expert.gate[order], expert.up[order], expert.down[:, order])


def _reordered_inputs(seen: ProjectionInputs, order: Tensor) -> ProjectionInputs:
    """What its down projection sees."""
    moments = None if seen.moments is None else seen.moments[order][:, order]
    return ProjectionInputs(seen.norms[order], seen.tokens, moments)


def _row_importance(matrix: Tensor, seen: ProjectionInputs, energies: Tensor) -> Tensor:
    """How much the squared errors of the rows of a gate or up projection count, float32 [I], 1 on average.

    That is the energy of a row's neuron over that of the row's own output.  matrix: bf16 [I, H]; seen: its inputs.
    """
    rows = matrix.float()
    moments = seen.norms.square().diag() if seen.moments is None else seen.moments
    own = ((rows @ moments) * rows).sum(dim=1)
    relative = (energies / own).nan_to_num(0.0, 0.0, 0.0).clamp(min=0) ** POWER
    return (relative / relative.mean()).nan_to_num(1.0).clamp(min=LEAST)


@dataclass(frozen=True)
class FacingPair:
    """Two experts with their neurons facing each other.

    orders: in which they stand, int64 [I] twice; row_importance: of gate and up, float32 [I, 2], how much their rows
    count in the pair.
    """

    experts: tuple[Expert, Expert]
    orders: tuple[Tensor, Tensor]
    row_importance: tuple[Tensor, Tensor]

    def down_inputs(
        self, inputs: tuple[ProjectionInputs, ProjectionInputs]
    ) -> tuple[ProjectionInputs, ProjectionInputs]:
        """What the down projections see."""
        return _reordered_inputs(inputs[0], self.orders[0]), _reordered_inputs(inputs[1], self.orders[1])


def face(experts: tuple[Expert, Expert], ids: tuple[int, int], statistics: ExpertStatistics | None) -> FacingPair:
    """Two experts so ordered; ids: theirs in `statistics`, without which all input columns count the same."""

    def seen(expert: Expert, number: int, index: int) -> ProjectionInputs:
        matrix = expert.matrices[index]
        return projection_inputs(statistics, number, index, matrix.shape[1], matrix.device)

    first, second = (neuron_energies(expert, seen(expert, it, 2)) for expert, it in zip(experts, ids, strict=True))
    orders = facing_orders((first, second))
    faced = _reordered(experts[0], orders[0]), _reordered(experts[1], orders[1])
    both = []
    for expert, number, energies, order in zip(faced, ids, (first, second), orders, strict=True):
        inputs = seen(expert, number, 0)  # of gate and up
        both.append([_row_importance(expert.matrices[index], inputs, energies[order]) for index in (0, 1)])
    gate, up = (torch.stack(rows, dim=1) for rows in zip(*both, strict=True))
    return FacingPair(faced, orders, (gate, up))


@dataclass(frozen=True)
class FacingNeurons:
    """One expert with its own neurons facing each other: in `facing_order`.

    inputs: what its projections see; rows: float32 [rows] of each, how much they count.
    """

    expert: Expert
    inputs: list[ProjectionInputs]
    rows: list[Tensor]

    @classmethod
    def of(cls, expert: Expert, number: int, statistics: ExpertStatistics) -> FacingNeurons:
        """number: the expert's id in `statistics`."""
        gate, up, down = (
            projection_inputs(statistics, number, index, matrix.shape[1], matrix.device)
            for index, matrix in enumerate(expert.matrices)
        )
        energies = neuron_energies(expert, down)
        order = facing_order(energies)
        faced, energies = _reordered(expert, order), energies[order]
        rows = [_row_importance(faced.gate, gate, energies), _row_importance(faced.up, up, energies)]
        every_row = rows[0].new_ones(len(faced.down))
        return cls(faced, [gate, up, _reordered_inputs(down, order)], [*rows, every_row])
