"""What each expert saw of the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzlemoe_offline.model.devices import on_each, sharing

FEW_TOKENS = 32
"""Below this many calibration tokens an expert's column norms say more about the tokens than about the expert: the
paper's rule merges its pair by magnitude alone, and least squares takes all its columns to be equally strong."""


@dataclass(frozen=True)
class ProjectionInputs:
    """What one expert's gate, up or down projection saw: X, one row a token.

    norms: float32 [K], the L2 norm of each column of X; tokens: its rows; moments: float32 [K, K], X'X, None where not
    gathered.
    """

    norms: Tensor
    tokens: int
    moments: Tensor | None = None

    def to(self, device: torch.device) -> ProjectionInputs:
        """The same on a device."""
        moments = None if self.moments is None else self.moments.to(device)
        return ProjectionInputs(self.norms.to(device), self.tokens, moments)

    @classmethod
    def unknown(cls, columns: int, device: torch.device | str) -> ProjectionInputs:
        """Columns that all count the same."""
        return cls(torch.ones(columns, device=device), 1)


class Moments:
    """X'X of what every expert saw, float32 [K, K] each, added up batch by batch; each lies on one of the devices that
    share the work."""

    def __init__(self, experts: int, size: int, device: torch.device):
        self.devices = sharing(device)
        shares = [len(range(place, experts, len(self.devices))) for place in range(len(self.devices))]
        self._of = [
            torch.zeros(count, size, size, device=each) for count, each in zip(shares, self.devices, strict=True)
        ]

    def __getitem__(self, expert: int) -> Tensor:
        return self._of[expert % len(self.devices)][expert // len(self.devices)]

    def add(self, counts: dict[int, int], rows: Tensor) -> None:
        """Adds bf16 or float32 rows X [m, K], those of each expert after those of the one before."""
        if self.devices[0].type == "cpu":
            for expert, its in zip(counts, rows.split([*counts.values()]), strict=True):
                exact = its.float()
                self[expert].addmm_(exact.T, exact)
            return
        from puzzlemoe_offline.calibration.moments_kernel import add_moments

        every = sum(len(share) for share in self._of)
        sizes = torch.tensor([0] + [counts.get(expert, 0) for expert in range(every)])
        starts = sizes.cumsum(0).int()

        def share(place: int, device: torch.device) -> None:
            add_moments(self._of[place], rows.to(device), starts.to(device), place, len(self.devices))

        on_each(self.devices, share)

    def diagonals(self) -> Tensor:
        """Column sums of squares, float32 [experts, K], on the first device."""
        first, *others = (share.diagonal(dim1=1, dim2=2) for share in self._of)
        if not others:
            return first
        every = torch.empty(sum(map(len, self._of)), first.shape[1], device=first.device)
        for place, its in enumerate((first, *others)):
            every[place :: len(self.devices)] = its.to(first.device)
        return every


@dataclass
class ExpertStatistics:
    """What the experts of one layer saw.

    tokens: int64 [E]; together: int64 [E, E], tokens that chose both experts; input_squares float64 [E, H] and
    hidden_squares float64 [E, I]: column sums of squares of the gate/up input and of the down projection's input
    SiLU(gate) * up; input_moments of H and hidden_moments of I columns: their second moments X'X, or None.
    """

    tokens: Tensor
    together: Tensor
    input_squares: Tensor
    hidden_squares: Tensor
    input_moments: Moments | None
    hidden_moments: Moments | None

    @classmethod
    def zeros(
        cls, experts: int, hidden: int, intermediate: int, device: torch.device, moments: bool = False
    ) -> ExpertStatistics:
        """Statistics of no tokens."""
        return cls(
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, experts, dtype=torch.int64),
            torch.zeros(experts, hidden, dtype=torch.float64, device=device),
            torch.zeros(experts, intermediate, dtype=torch.float64, device=device),
            Moments(experts, hidden, device) if moments else None,
            Moments(experts, intermediate, device) if moments else None,
        )

    def observe(self, counts: dict[int, int], inputs: Tensor, hidden: Tensor) -> None:
        """Adds one batch: inputs [m, H] and hidden [m, I], the rows of each expert after those of the one before, so
        many as `counts` says."""
        for squares, moments, rows in (
            (self.input_squares, self.input_moments, inputs),
            (self.hidden_squares, self.hidden_moments, hidden),
        ):
            if moments is not None:
                moments.add(counts, rows)
            if moments is not None and squares.is_cuda:  # where a product is one kernel, and every expert's sum another
                squares.copy_(moments.diagonals())
                continue
            for expert, its in zip(counts, rows.split([*counts.values()]), strict=True):
                squares[expert] += its.float().square().sum(dim=0).to(squares.device)
        self.tokens[list(counts)] += torch.tensor([*counts.values()])

    def observe_choices(self, ids: Tensor) -> None:
        """Adds the experts, int [m, k], that one batch's tokens chose."""
        chosen = torch.zeros(len(ids), len(self.tokens), device=ids.device).scatter_(1, ids.long(), 1)
        self.together += (chosen.T @ chosen).cpu().long()

    def inputs(self, expert: int, projection: int, flat: bool = False) -> ProjectionInputs:
        """What an expert's gate (0), up (1) or down (2) projection saw.

        flat: as if its tokens, at least one, had the mean energy of the layer's in every column and nothing correlated.
        """
        squares, moments = (
            (self.hidden_squares, self.hidden_moments) if projection == 2 else (self.input_squares, self.input_moments)
        )
        norms, tokens = squares[expert].sqrt().float(), int(self.tokens[expert])
        if flat:
            tokens = max(tokens, 1)
            energy = squares.sum() / max(int(self.tokens.sum()), 1) / squares.shape[1] * tokens
            norms = energy.sqrt().float().expand(squares.shape[1])
            return ProjectionInputs(norms, tokens, None if moments is None else norms.square().diag())
        return ProjectionInputs(norms, tokens, None if moments is None else moments[expert])


def few_tokens(tokens: Tensor) -> list[int]:
    """Experts that saw too few calibration tokens, int [E], for their column norms to mean something."""
    return [expert for expert, count in enumerate(tokens.tolist()) if count < FEW_TOKENS]


def projection_inputs(
    statistics: ExpertStatistics | None, expert: int, index: int, columns: int, device: torch.device
) -> ProjectionInputs:
    """What an expert's gate (0), up (1) or down (2) projection saw; columns that count the same without statistics, and
    for an expert that saw few tokens."""
    if statistics is None:
        return ProjectionInputs.unknown(columns, device)
    return statistics.inputs(expert, index, flat=int(statistics.tokens[expert]) < FEW_TOKENS)
