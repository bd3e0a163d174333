"""Where text comes from: files and hub datasets as a command line names them, and each one's share of the samples."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from puzzlemoe_vllm.errors import UserError, shown

PLAIN, JSON, CSV, TSV, PARQUET = "plain text", "JSON", "CSV", "TSV", "Parquet"

# WikiText's own files end in .raw and .tokens.
FORMATS = dict.fromkeys(("", ".txt", ".text", ".md", ".raw", ".tokens"), PLAIN) | {
    ".json": JSON,
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
}
"""A file's format by its suffix, the one of its compression taken off."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_WEIGHTED = re.compile(r"(?P<name>.+)=(?P<weight>[0-9]{1,9}(\.[0-9]{1,9})?)", re.DOTALL)
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?", re.ASCII)


class CalibrationError(UserError):
    """Text that cannot be used, to calibrate or to be scored; the message says why."""


@dataclass(frozen=True)
class TextFile:
    """A local file, its format and the suffix of its compression, which may be none."""

    path: Path
    format: str
    compression: str

    @property
    def name(self) -> str:
        """What provenance calls it: what is written may be published, so a file goes by its name."""
        return self.path.name

    def __str__(self) -> str:
        return shown(self.path, 160)


@dataclass(frozen=True)
class HubDataset:
    """A split of a hub dataset; config: None for its only one."""

    id: str
    config: str | None
    split: str
    name: str

    def __str__(self) -> str:
        return shown(self.name)


@dataclass(frozen=True)
class Source:
    """Where to read, and how much of the calibration comes from there beside other sources' weights."""

    origin: TextFile | HubDataset
    weight: Fraction


def parse_origin(name: str) -> TextFile | HubDataset:
    """A file or hub dataset by its name.  Raises CalibrationError as `parse_source`."""
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if os.path.isfile(name):
        return TextFile(path, _format(path, suffix, compression), compression)
    if os.path.isdir(name):
        raise CalibrationError(f"{shown(name, 160)}: a folder; give a file of it, and each further one the same way")
    if os.path.lexists(name):
        raise CalibrationError(f"{shown(name, 160)}: not a regular file; write its text to a file and give that")
    hub = _HUB.fullmatch(name)
    if hub and not compression and suffix not in FORMATS.keys() - {""}:
        return HubDataset(hub["id"], hub["config"] or None, hub["split"] or "train", name)
    hint = "; a weight is a number above 0, as in SOURCE=0.5" if "=" in name else ""
    raise CalibrationError(
        f"{shown(name, 160)}: no such file; give a file, or a hub dataset as owner/name[:config[:split]]{hint}"
    )


def parse_source(spelled: str) -> Source:
    """SOURCE or SOURCE=WEIGHT, where SOURCE is a file or a hub dataset, owner/name[:config[:split]].

    Only a decimal number after the last `=` is a weight, and a file of the whole name goes first.
    Raises CalibrationError, before anything is read, for what is neither and for files of an unknown format.
    """
    if "://" in spelled:
        raise CalibrationError(f"{shown(spelled)}: a URL; download it, or name a hub dataset as owner/name")
    weighted = None if os.path.lexists(spelled) else _WEIGHTED.fullmatch(spelled)
    if not weighted:
        return Source(parse_origin(spelled), Fraction(1))
    weight = Fraction(weighted["weight"])
    if not weight:
        raise CalibrationError(f"{shown(spelled, 160)}: a weight is a number above 0, as in SOURCE=0.5")
    return Source(parse_origin(weighted["name"]), weight)


def parse_sources(spelled: Sequence[str]) -> list[Source]:
    """`parse_source` of each.  Raises CalibrationError too when there is none or one is given twice."""
    sources = [parse_source(source) for source in spelled]
    if not sources:
        raise CalibrationError("no source of text: give a file or a hub dataset")
    seen = set()
    for source in sources:
        key = source.origin.path.resolve() if isinstance(source.origin, TextFile) else source.origin.name
        if key in seen:
            raise CalibrationError(f"{source.origin} is given twice: give it once, with more weight as SOURCE=2")
        seen.add(key)
    return sources


def shares(sources: Sequence[Source], samples: int) -> list[int]:
    """Each source's part of `samples` by its weight, rounded by largest remainders, of equal ones the first.

    Raises CalibrationError when one would get none.
    """
    total = sum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    parts = [int(part) for part in exact]
    left_over = sorted(range(len(sources)), key=lambda index: parts[index] - exact[index])
    for index in left_over[: samples - sum(parts)]:
        parts[index] += 1
    for source, part in zip(sources, parts, strict=True):
        if not part:
            raise CalibrationError(
                f"{source.origin} gets none of {samples} samples: raise --samples or its weight, or drop it"
            )
    return parts


def _format(path: Path, suffix: str, compression: str) -> str:
    if suffix not in FORMATS:
        known = " ".join(suffix for suffix in FORMATS if suffix)
        raise CalibrationError(
            f"{shown(path, 160)}: {shown(suffix, 20)} is no format of text; plain text goes by .txt, other text by one "
            f"of {known}, each also with {' '.join(COMPRESSIONS)}"
        )
    if FORMATS[suffix] == PARQUET and compression:
        raise CalibrationError(f"{shown(path, 160)}: Parquet is compressed inside; unpack the file's {compression}")
    return FORMATS[suffix]
