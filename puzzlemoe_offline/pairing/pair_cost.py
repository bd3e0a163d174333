"""What merging any two experts would cost in accuracy, estimated on a sample of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, projection_inputs
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.pairing.lost import LOST
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.nearest import (
    PackedMatrix,
    bounded_importance,
    fit,
    own_importance,
    pair_importance,
    stored_steps,
)
from puzzlemoe_vllm.format.codes import TrellisCode, UnencodableWeight, get_code

ROWS = 128
"""Most rows of a projection that are sampled."""

ENTRIES = {"cpu": 1 << 14, "cuda": 1 << 24}
"""Weights fitted at once: few enough for the cache of a CPU, enough to keep a GPU busy."""

LOAD_PRICE = 0.04
"""`balanced`: the relative squared error, summed over the projections, that is taken for loading none of a token's
experts."""


@dataclass(frozen=True)
class _Sample:
    """Sampled rows of a projection of the experts of a pool, [n, rows, K]; `own_importance` of each [n, K], and whether
    it saw few tokens, bool [n, 1]."""

    rows: Tensor
    own: Tensor
    few: Tensor
    pool: list[int]
    projection: str

    def merge(
        self, a: Tensor, b: Tensor, recipe: PairRecipe, group: int | None
    ) -> tuple[tuple[Tensor, Tensor], PackedMatrix]:
        """The rows of experts a and b, int [pairs], side by side as columns of two matrices, and what they become.

        Raises UnencodableWeight naming two experts and the projection.
        """
        importance = pair_importance((self.own[a], self.own[b]), self.few[a] | self.few[b], recipe)
        weights = self.rows[a].transpose(0, 1).flatten(1), self.rows[b].transpose(0, 1).flatten(1)
        try:
            return weights, fit(weights, (importance[0].flatten(), importance[1].flatten()), recipe, group)
        except UnencodableWeight as error:
            for pair in zip(a.split(1), b.split(1), strict=True) if len(a) > 1 else ():
                self.merge(*pair, recipe, group)
            ids = f"{self.pool[int(a[0])]} and {self.pool[int(b[0])]}"
            raise UnencodableWeight(f"experts {ids}, {self.projection} projection: {error}") from None


def loads_saved(pool: list[int], statistics: ExpertStatistics) -> Tensor:
    """Symmetric float64 [n, n]: by how much less of its experts a token loads if two of the pool are partners, on
    average over the calibration tokens.  One that chose both loads them once."""
    together = statistics.together[pool][:, pool].double()
    return together / max(int(statistics.tokens.sum()), 1)


def merge_errors(
    pool: list[int],
    expert: Callable[[int], Expert],
    statistics: ExpertStatistics | None,
    recipe: PairRecipe,
    group: int | None,
    device: torch.device,
) -> Tensor:
    """Symmetric float64 [n, n] on the CPU: for any two of the n experts of `pool`, how much merging them loses.

    That is the squared error of the merged weights times the squared norm of their input columns, summed over both
    experts and all calibration tokens, relative to the pool's energy in the same measure; the sum over gate, up and
    down projection.  Without statistics every input column counts the same.
    The merged weights are those of the recipe's code and rule, without compensation, on evenly spaced rows: `ROWS`, or
    so many that the search fits no more weights than merging the pool does.  Many pairs are fitted at once, side by
    side as columns of one matrix.
    Of trellis codes' words, which take too long to find, it is what theory says (`shared_bits_errors`).
    Infinite for two of which one would be lost (`LOST`) in any projection; but not by the paper's rule, which merges
    whatever it meets.
    Raises UnencodableWeight naming the experts and the projection.
    """
    code, count = get_code(recipe.code), len(pool)
    first, second = torch.triu_indices(count, count, offset=1)
    errors = torch.zeros(count, count, dtype=torch.float64, device=device)
    lost = torch.zeros(count, count, dtype=torch.bool, device=device)
    for index, projection in enumerate(PROJECTIONS):
        matrices = [getattr(expert(number), projection) for number in pool]
        rows, columns = matrices[0].shape
        sampled = min(ROWS, -(-rows // (count - 1)))
        chosen = torch.linspace(0, rows - 1, sampled).round().long()
        sample = torch.stack([matrix[chosen.to(matrix.device)].to(device) for matrix in matrices])
        # Moments are not looked at here, and those of an expert with few tokens would be made for each anew.
        inputs = [
            replace(projection_inputs(statistics, number, index, columns, device), moments=None) for number in pool
        ]
        squares = torch.stack([seen.norms.square() for seen in inputs])
        energy = float((sample.float().square().sum(dim=1) * squares).sum())
        own = torch.stack([own_importance(seen, recipe) for seen in inputs])
        few = torch.tensor([[seen.tokens < FEW_TOKENS] for seen in inputs], device=device)
        most = LOST**2 * sample.double().square().sum(dim=(1, 2))
        if isinstance(code, TrellisCode):
            _check_steps(sample, pool, projection)
            total, gone = shared_bits_errors(code, sample, own, few, squares, recipe)
            errors += total / (energy or 1.0)
            lost |= gone
            continue
        trial = _Sample(sample, own, few, pool, projection)
        at_once = max(1, ENTRIES[device.type] // (sampled * columns))
        for pairs in zip(first.to(device).split(at_once), second.to(device).split(at_once), strict=True):
            a, b = pairs
            weights, packed = trial.merge(a, b, recipe, group)
            cost = torch.zeros(len(a), device=device)
            for position, (exact, members) in enumerate(zip(weights, pairs, strict=True)):
                difference = exact.float() - code.decode(packed.words, position, packed.steps).float()
                by_column = difference.square().sum(dim=0).view(-1, columns)
                cost += (by_column * squares[members]).sum(dim=1)
                # Not `>`: NaN is lost, too.
                lost[a, b] |= ~(by_column.double().sum(dim=1) <= most[members])
            errors[a, b] += cost.double() / energy if energy else 0.0
    if not recipe.is_paper:
        errors.masked_fill_(lost, torch.inf)
    return (errors.triu(1) + errors.triu(1).T).cpu()


def _check_steps(sample: Tensor, pool: list[int], projection: str) -> None:
    """Raises UnencodableWeight, as fitting would, naming an expert whose rows [n, rows, K] no steps can hold, and its
    first partner."""
    for place, rows in enumerate(sample):
        try:
            stored_steps(rows.float().square().mean(dim=1).sqrt())
        except UnencodableWeight as error:
            ids = sorted((pool[place], pool[place - 1]))
            raise UnencodableWeight(f"experts {ids[0]} and {ids[1]}, {projection} projection: {error}") from None


def shared_bits_errors(
    code: TrellisCode, sample: Tensor, own: Tensor, few: Tensor, squares: Tensor, recipe: PairRecipe
) -> tuple[Tensor, Tensor]:
    """Errors of any two experts whose words share their bits as rate-distortion theory has it, float64 [n, n], and
    whether that loses one, bool [n, n].

    An entry's two weighted errors are equal, 2^-bits of their variances' geometric mean, unless the smaller variance is
    below that and gets no bits.  sample: [n, rows, K]; own, squares: [n, K], own and true weights of squared errors;
    few: bool [n, 1].
    """
    variance = sample.float().square().mean(dim=1)
    total = torch.zeros(len(own), len(own), dtype=torch.float64, device=own.device)
    lost = torch.zeros_like(total, dtype=torch.bool)
    for first in range(len(own)):
        its = pair_importance((own[first].expand_as(own), own), few[first] | few, recipe)
        both = torch.stack([variance[first].expand_as(variance), variance])
        mean = both.mean(dim=2, keepdim=True)
        importance = torch.stack(bounded_importance(code, its, (mean[0], mean[1])))
        energy = importance * both
        shared = 2.0**-code.bits * energy.prod(dim=0).sqrt()
        alone = torch.where(energy >= energy.flip(0), 4.0**-code.bits * energy, energy)
        error = torch.where(shared <= energy.amin(dim=0), shared, alone) / importance
        by_expert = error * torch.stack([squares[first].expand_as(squares), squares])
        total[first] = sample.shape[1] * by_expert.sum(dim=(0, 2), dtype=torch.float64)
        lost[first] = (error.sum(dim=2) > LOST**2 * both.sum(dim=2)).any(dim=0)
    return total, lost
