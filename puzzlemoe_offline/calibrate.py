"""Calibration: token windows, and what each expert sees of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

C4 = "allenai/c4"
C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


FEW_TOKENS = 32
"""Below this many calibration tokens an expert's column norms say more about the tokens than about the expert: the
paper's rule merges its pair by magnitude alone, and least squares takes all its columns to be equally strong."""


class CalibrationError(ValueError):
    """Calibration text that cannot be used; the text says why."""


@dataclass(frozen=True)
class Calibration:
    """Token windows [samples, sequence_length] int64 and the digest that provenance records."""

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def load_calibration(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, seed: int = 0
) -> Calibration:
    """Token windows from a plain text file, a .jsonl file with a `text` field, or a hub dataset with a `text` column.

    A file is cut into as many equal parts as there are samples, and the seed chooses a window from each; a hub dataset
    is streamed until there are enough.
    Raises CalibrationError when the source is missing, malformed, or too short for one window.
    """
    path = Path(source)
    if path.is_file():
        tokens = torch.tensor([token for text in _file_texts(path) for token in tokenizer(text)["input_ids"]])
    elif path.exists() or path.suffix in (".txt", ".jsonl", ".json"):
        raise CalibrationError(f"{source}: not a file; give a text file, a .jsonl file or a hub dataset id")
    else:
        needed, ids = samples * sequence_length, []
        for text in _hub_texts(source):
            ids += tokenizer(text)["input_ids"]
            if len(ids) >= needed:
                break
        tokens = torch.tensor(ids[:needed])
    available = len(tokens) // sequence_length
    if available == 0:
        raise CalibrationError(
            f"{source} has {len(tokens)} tokens, fewer than one window of {sequence_length}: give more text or a "
            "smaller --sequence-length"
        )
    parts, rng = min(samples, available), random.Random(seed)
    chosen = [rng.randrange(part * available // parts, (part + 1) * available // parts) for part in range(parts)]
    # What is written may be published: a file goes by its name.
    name = path.name if path.is_file() else source
    return Calibration(tokens[: available * sequence_length].view(available, sequence_length)[chosen], name)


def _file_texts(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _text_field(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: {error}; give text in UTF-8") from None


def _text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(f'{where}: expected a JSON object with a "text" field that is a string')
    return text


def _hub_texts(dataset: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        files = {"train": C4_SHARD} if dataset == C4 else None
        for row in load_dataset(dataset, data_files=files, split="train", streaming=True):
            if "text" not in row:
                raise CalibrationError(f"{dataset}: its train split has no `text` column")
            yield row["text"]
    except CalibrationError:
        raise
    except Exception as error:  # datasets raises whatever its file system and builder layers raise
        raise CalibrationError(
            f"dataset {dataset} could not be read ({type(error).__name__}: {error}); "
            "give a local file with --calibration FILE"
        ) from None


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


def add_moments(moments: Tensor, rows: Tensor) -> None:
    """Adds X'X of bf16 or float32 rows X [m, K] to float32 moments [K, K], in place."""
    # TF32 has more than the mantissa of a bf16: on a GPU the products stay exact and take a fraction of the time.
    settings = torch.backends.cuda.matmul
    before, exact = settings.allow_tf32, rows.float()
    settings.allow_tf32 = before or rows.dtype == torch.bfloat16
    try:
        moments.addmm_(exact.T, exact)
    finally:
        settings.allow_tf32 = before


@dataclass
class ExpertStatistics:
    """What the experts of one layer saw.

    tokens: int64 [E]; together: int64 [E, E], tokens that chose both experts; input_squares float64 [E, H] and
    hidden_squares float64 [E, I]: column sums of squares of the gate/up input and of the down projection's input
    SiLU(gate) * up; input_moments float32 [E, H, H] and hidden_moments float32 [E, I, I]: their second moments X'X, or
    None.
    """

    tokens: Tensor
    together: Tensor
    input_squares: Tensor
    hidden_squares: Tensor
    input_moments: Tensor | None
    hidden_moments: Tensor | None

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
            torch.zeros(experts, hidden, hidden, device=device) if moments else None,
            torch.zeros(experts, intermediate, intermediate, device=device) if moments else None,
        )

    def observe(self, expert: int, inputs: Tensor, hidden: Tensor) -> None:
        """Adds one batch; inputs [m, H], hidden [m, I]."""
        self.tokens[expert] += inputs.shape[0]
        self.input_squares[expert] += inputs.float().square().sum(dim=0)
        self.hidden_squares[expert] += hidden.float().square().sum(dim=0)
        if self.input_moments is not None and self.hidden_moments is not None:
            add_moments(self.input_moments[expert], inputs)
            add_moments(self.hidden_moments[expert], hidden)

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


@dataclass
class SampledTokens:
    """MoE inputs and outputs of a few calibration tokens, kept to measure the output error of the merged layer."""

    limit: int
    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def record(self, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """Keeps hidden [M, H], ids [M, k], weights [M, k] and out [M, H] up to `limit` tokens."""
        if room := self.limit - sum(len(batch[0]) for batch in self.batches):
            self.batches.append((hidden[:room].clone(), ids[:room].clone(), weights[:room].clone(), out[:room].clone()))
