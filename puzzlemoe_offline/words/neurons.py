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


@dataclass(frozen=True)
class OrderedExpert:
    """An expert with its neurons in another order, or where they were.

    Of gate, up and down projection, inputs: what they see; rows: float32 [rows], how much the squared errors of its
    rows count, none where all count the same.
    """

    expert: Expert
    inputs: list[ProjectionInputs]
    rows: list[Tensor]


def face(
    experts: tuple[Expert, Expert], ids: tuple[int, int], statistics: ExpertStatistics | None
) -> tuple[OrderedExpert, OrderedExpert]:
    """Two experts whose neurons face each other; ids: theirs in `statistics`, without which all input columns count the
    same."""
    (first, second), (inputs0, inputs1) = experts, map(_inputs_of, experts, ids, (statistics, statistics))
    energies = neuron_energies(first, inputs0[2]), neuron_energies(second, inputs1[2])
    order0, order1 = facing_orders(energies)
    return _ordered(first, inputs0, energies[0], order0), _ordered(second, inputs1, energies[1], order1)


def as_it_stands(expert: Expert, number: int, statistics: ExpertStatistics | None) -> OrderedExpert:
    """One expert whose neurons stay where they are; number: its id in `statistics`."""
    return OrderedExpert(expert, _inputs_of(expert, number, statistics), [])


def face_itself(expert: Expert, number: int, statistics: ExpertStatistics) -> OrderedExpert:
    """One expert whose own neurons do; number: its id in `statistics`."""
    inputs = _inputs_of(expert, number, statistics)
    energies = neuron_energies(expert, inputs[2])
    return _ordered(expert, inputs, energies, facing_order(energies))


def _inputs_of(expert: Expert, number: int, statistics: ExpertStatistics | None) -> list[ProjectionInputs]:
    return [
        projection_inputs(statistics, number, index, matrix.shape[1], matrix.device)
        for index, matrix in enumerate(expert.matrices)
    ]


def _ordered(expert: Expert, inputs: list[ProjectionInputs], energies: Tensor, order: Tensor) -> OrderedExpert:
    gate, up, down = inputs
    ordered, energies = Expert(expert.gate[order], expert.up[order], expert.down[:, order]), energies[order]
    moments = None if down.moments is None else down.moments[order][:, order]
    rows = [_row_importance(ordered.gate, gate, energies), _row_importance(ordered.up, up, energies)]
    every_row = rows[0].new_ones(len(ordered.down))
    return OrderedExpert(
        ordered, [gate, up, ProjectionInputs(down.norms[order], down.tokens, moments)], [*rows, every_row]
    )


def _row_importance(matrix: Tensor, seen: ProjectionInputs, energies: Tensor) -> Tensor:
    """How much the squared errors of the rows of a gate or up projection count, float32 [I], 1 on average.

    That is the energy of a row's neuron over that of the row's own output.  matrix: bf16 [I, H]; seen: its inputs.
    """
    rows = matrix.float()
    moments = seen.norms.square().diag() if seen.moments is None else seen.moments
    own = ((rows @ moments) * rows).sum(dim=1)
    relative = (energies / own).nan_to_num(0.0, 0.0, 0.0).clamp(min=0) ** POWER
    return (relative / relative.mean()).nan_to_num(1.0).clamp(min=LEAST)
