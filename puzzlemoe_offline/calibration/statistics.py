"""What each expert saw of the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    @classmethod
    def unknown(cls, columns: int, device: torch.device | str) -> ProjectionInputs:
        """Columns that all count the same."""
        return cls(torch.ones(columns, device=device), 1)


def add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds Y'X of bf16 or float32 rows Y [m, N] and X [m, K] to float32 sums [N, K], in place."""
    if right.is_cuda and right.dtype == torch.bfloat16:
        # Products of bf16 are exact in float32, and so they are added up.
        sums += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        sums.addmm_(left.float().T, right.float())


def column_squares(rows: Tensor, counts: list[int]) -> Tensor:
    """Column sums of the squares of rows [m, K] of each expert, float32 [experts, K].

    By norms, which a GPU finds without a float32 copy of the rows.
    """
    norms = [torch.linalg.vector_norm(its, dim=0, dtype=torch.float32) for its in rows.split(counts)]
    return torch.stack(norms).square()


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [m, K] multiplied by weights [m], in the rows' dtype."""
    if rows.is_cuda:
        from puzzlemoe_offline.calibration.weighted_rows import weighted_rows

        return weighted_rows(rows, weights)
    return torch.mul(rows, weights[:, None], out=torch.empty_like(rows))


@dataclass
class ExpertStatistics:
    """What the experts of one layer saw.

    tokens: int64 [E]; together: int64 [E, E], tokens that chose both experts; input_squares float64 [E, H] and
    hidden_squares float64 [E, I]: column sums of squares of the gate/up input and of the down projection's input
    SiLU(gate) * up; input_moments float32 [E, H, H] and hidden_moments float32 [E, I, I]: their second moments X'X, or
    None.
    by_router: whether X's rows are multiplied by the router's weights, as the errors that they lead to are.
    """

    tokens: Tensor
    together: Tensor
    input_squares: Tensor
    hidden_squares: Tensor
    input_moments: Tensor | None
    hidden_moments: Tensor | None
    by_router: bool = False

    @classmethod
    def zeros(
        cls,
        experts: int,
        hidden: int,
        intermediate: int,
        device: torch.device,
        moments: bool = False,
        hidden_moments: bool = True,
        by_router: bool = False,
    ) -> ExpertStatistics:
        """Statistics of no tokens; hidden_moments: whether moments, if any, are to be gathered of hidden values too."""
        return cls(
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, experts, dtype=torch.int64),
            torch.zeros(experts, hidden, dtype=torch.float64, device=device),
            torch.zeros(experts, intermediate, dtype=torch.float64, device=device),
            torch.zeros(experts, hidden, hidden, device=device) if moments else None,
            torch.zeros(experts, intermediate, intermediate, device=device) if moments and hidden_moments else None,
            by_router,
        )

    def observe(self, first: int, counts: list[int], inputs: Tensor, hidden: Tensor, weights: Tensor) -> None:
        """Adds one batch: inputs [m, H], hidden [m, I] and the router's weights [m], the rows of each expert after
        those of the one before; counts: of the rows of expert `first` and of those that follow it."""
        experts = slice(first, first + len(counts))
        self.tokens[experts] += torch.tensor(counts)
        if self.by_router:
            inputs, hidden = weighted(inputs, weights), weighted(hidden, weights)
        self.input_squares[experts] += column_squares(inputs, counts)
        self.hidden_squares[experts] += column_squares(hidden, counts)
        for rows, moments in ((inputs, self.input_moments), (hidden, self.hidden_moments)):
            if moments is not None:
                for its_moments, its_rows in zip(moments[experts], rows.split(counts), strict=True):
                    if len(its_rows):
                        add_products(its_moments, its_rows, its_rows)

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
