"""Mutated model folders, read as `puzzlemoe inspect` reads them: each is refused in one line, or is what it was.

    PYTHONPATH=.:tests python tests/fuzz/folders.py --seed 0 --mutants 10000

Mutant n of a seed is always the same; `--only n` repeats one, with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.models import build
from support.runs import compress_pairs, unpack

from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.hub import locate, small_files
from puzzlemoe_offline.model.inspection import inspect
from puzzlemoe_offline.model.tokenizer import tokenizer_of
from puzzlemoe_vllm.errors import UserError
from puzzlemoe_vllm.format.shards import INDEX

SECRET = "the-secret-of-another-folder"
SECONDS = 5
ROOM = 12 << 30
"""Bytes of address space beyond what the process has, lest a size in config.json fill the machine."""

REFUSED, SAME, UNDETECTABLE = "refused", "same", "changed, no digests"
CHANGED, TRACEBACK, HANG, OUTSIDE, LONG = "changed", "traceback", "hang", "read outside", "no short line"
FAULTS = (CHANGED, TRACEBACK, HANG, OUTSIDE, LONG)


class Hang(BaseException):
    """Reading took more than `SECONDS`."""


@dataclass
class Opened:
    """Files that Python opened while it was told to watch."""

    watching: bool = False
    paths: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if self.watching and event == "open" and isinstance(arguments[0], str | bytes):
            self.paths.append(os.fsdecode(arguments[0]))


OPENED = Opened()
sys.addaudithook(OPENED)


@dataclass
class Base:
    """A good folder, and what its tensors and experts are."""

    folder: Path
    digests: bool
    tensors: dict[str, torch.Tensor]
    experts: list[torch.Tensor]


def contents(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """All tensors as stored, and all experts' matrices as they are decoded."""
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    experts = [
        matrix
        for layer in checkpoint.moe_layers
        for number in range(checkpoint.experts)
        for matrix in checkpoint.expert(layer, number).matrices
    ]
    return tensors, experts


def bases(folder: Path) -> list[Base]:
    """Dense in one file, dense in two with an index, packed with and without steps, unpacked with digests."""
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 64}
    dense = build("qwen3_moe", folder / "dense", num_experts=4, **small)
    split = build("qwen3_moe", folder / "split", num_experts=4, **small)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, split / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (split / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    compress_pairs(dense, folder / "angle8", sparsity=0.25, code="angle8", group_size=32)
    compress_pairs(dense, folder / "mask16")
    unpack(folder / "mask16", folder / "unpacked")
    found = []
    for name in ("dense", "split", "angle8", "mask16", "unpacked"):
        checkpoint = Checkpoint(folder / name)
        digests = inspect(checkpoint)["checked"] == "digests"
        tensors, experts = contents(checkpoint)
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        found.append(Base(folder / name, digests, copies, [expert.clone() for expert in experts]))
    return found


# Mutations: each changes a folder, given its random numbers and a folder outside with secrets.
Mutation = Callable[[Path, random.Random, Path], object]


def shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def json_file(folder: Path, rng: random.Random) -> Path:
    """config.json and the index more often than others."""
    files = sorted(folder.glob("*.json"))
    often = [path for path in files if path.name in ("config.json", INDEX)]
    return rng.choice(files + 3 * often)


def header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def flip_data(folder: Path, rng: random.Random, outside: Path) -> None:
    path = shard(folder, rng)
    data = bytearray(path.read_bytes())
    start = 8 + header_length(data)
    for _ in range(rng.choice((1, 1, 4))):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header(folder: Path, rng: random.Random, outside: Path) -> None:
    path = shard(folder, rng)
    data = bytearray(path.read_bytes())
    end = 8 + header_length(data)
    for _ in range(rng.choice((1, 1, 2))):
        data[rng.randrange(end if rng.random() < 0.8 else 8)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def resize(folder: Path, rng: random.Random, outside: Path) -> None:
    path = any_file(folder, rng)
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            path.write_bytes(data[:place])
        case 1:
            path.write_bytes(data + bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 1000)))))
        case 2:
            path.write_bytes(b"")
        case _:
            path.write_bytes(data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :])


def hostile(rng: random.Random, outside: Path) -> Any:
    deep: Any = 1
    for _ in range(rng.choice((3, 400))):
        deep = [deep]
    return rng.choice(
        (
            None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**40, 1e308, "", "x" * 5000, "\n\x1b[31m\u202e", [], {},
            ["a"], {"a": 1}, deep, "BF16", "F4", "F8_E4M3", "../outside/secret.safetensors", str(outside / "secret"),
            "/dev/zero", "tokenizer.json", "model.safetensors", [2**40, 2**40], [-1, 5], "\ud800",
        )
    )  # fmt: skip


def change_value(data: Any, rng: random.Random, outside: Path) -> None:
    """One value of an object, at any depth, is replaced, removed, renamed, or swapped with another."""
    places = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(data)
    if not places:
        return
    value, key = rng.choice(places)
    match rng.randrange(5):
        case 0 if isinstance(value, dict):
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice(("stray", "x" * 3000, "model.layers.7.x", "\n", f"{key}2"))] = value.pop(key)
        case 2:
            other, place = rng.choice(places)
            value[key], other[place] = other[place], value[key]
        case _:
            value[key] = hostile(rng, outside)


def change_json(folder: Path, rng: random.Random, outside: Path) -> None:
    path = json_file(folder, rng)
    data = json.loads(path.read_text())
    with contextlib.suppress(KeyError, IndexError, RecursionError):  # swapped with a part of itself
        change_value(data, rng, outside)
    with contextlib.suppress(ValueError, RecursionError):
        path.write_text(json.dumps(data))


def change_header(folder: Path, rng: random.Random, outside: Path) -> None:
    path = shard(folder, rng)
    data = path.read_bytes()
    length = header_length(data)
    header = json.loads(data[8 : 8 + length])
    with contextlib.suppress(KeyError, IndexError):
        change_value(header, rng, outside)
    with contextlib.suppress(ValueError):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite_shard(folder: Path, rng: random.Random, outside: Path) -> None:
    """A whole shard with a tensor dropped, added, cast, reshaped or put in another's place."""
    path = shard(folder, rng)
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match rng.randrange(6):
        case 0:
            pass
        case 1:
            tensors |= {
                name: tensor,
                rng.choice(("stray", f"{name}_2", "model.layers.0.mlp.experts.9.w")): tensor.clone(),
            }
        case 2:
            tensors[name] = tensor.to(rng.choice((torch.float16, torch.float32, torch.int64, torch.uint8)))
        case 3:
            tensors[name] = tensor.flatten()[: rng.randrange(1, 1 + tensor.numel())].clone()
        case 4:
            tensors[rng.choice(("base_model.model.", "_orig_mod.", "module.")) + name] = tensor
        case _:
            other = rng.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensor
    save_file(tensors, path, metadata={"format": "pt"})


def change_kind(folder: Path, rng: random.Random, outside: Path) -> None:
    """A file becomes something else, or a link."""
    path = any_file(folder, rng)
    inside = any_file(folder, rng)
    path.unlink()
    match rng.randrange(9):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            suffix = path.suffix if path.suffix in (".safetensors", ".json") else ""
            path.symlink_to(outside / f"secret{suffix}")
        case 3:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", "/proc/self/mem")))
        case 4:
            path.symlink_to(path)
        case 5:
            path.symlink_to(inside)
        case 6:
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        case 7:
            path.symlink_to(outside)
        case _:
            path.write_bytes(
                rng.choice((b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"9" * 5000, b"null", b'{"a":1,"a":2}'))
            )


def change_files(folder: Path, rng: random.Random, outside: Path) -> None:
    """Files removed, exchanged, doubled under names that some loader reads, or added."""
    one, other = shard(folder, rng), any_file(folder, rng)
    match rng.randrange(6):
        case 0:
            other.unlink()
        case 1:
            moved = folder / "moved"
            one.rename(moved)
            if other.exists():
                other.rename(one)
            moved.rename(other)
        case 2:
            names = (
                "consolidated.safetensors",
                "adapter_model.safetensors",
                "zz.safetensors",
                "x" * 243 + ".safetensors",
            )
            shutil.copyfile(one, folder / rng.choice(names))
        case 3:
            names = (
                "quantize_config.json",
                "hf_quant_config.json",
                "adapter_config.json",
                "model.safetensors.incomplete",
            )
            (folder / rng.choice(names)).write_text(rng.choice(("{}", "[]", "", SECRET)))
        case 4:
            (folder / rng.choice(("notes.txt", "x.json", "LICENSE", "model.py", "x.jinja"))).symlink_to(
                outside / "secret"
            )
        case _:
            (folder / "additional_chat_templates").symlink_to(outside)


MUTATIONS: dict[str, Mutation] = {
    "bits of tensors": flip_data,
    "bits of headers": flip_header,
    "length of files": resize,
    "values of JSON": change_json,
    "values of headers": change_header,
    "tensors of shards": rewrite_shard,
    "kind of files": change_kind,
    "names of files": change_files,
}


def read(folder: Path) -> tuple[Checkpoint, str]:
    """All that the tool reads of a folder, and the text that could get out of it."""
    place = locate(str(folder)).folder
    checkpoint = Checkpoint(place)
    facts = inspect(checkpoint)
    tokenizer = tokenizer_of(place)
    copied = b"".join(path.read_bytes() for path in small_files(place))
    said = json.dumps(facts) + repr(tokenizer) + copied.decode(errors="replace") + " ".join(checkpoint.names)
    return checkpoint, said


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No more than `SECONDS` and `ROOM`."""

    def hang(*_: object) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(base: Base, folder: Path, outside: Path, kind: str, show: bool = False) -> tuple[str, str]:
    """The class of a mutant, and what was said of it."""
    OPENED.paths.clear()
    OPENED.watching = True
    checkpoint = None
    try:
        with limits():
            checkpoint, said = read(folder)
        result = SAME
    except UserError as error:
        result, said = REFUSED, str(error)
        # The path of the folder is not the folder's doing.
        if len(said.replace(str(folder), "")) > 400 or not said.isprintable():
            result = LONG
    except Hang:
        result, said = HANG, ""
    except BaseException as error:  # whatever else is the fault that is looked for
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        result, said = TRACEBACK, f"{type(error).__name__}: {error}"[:300]
        if show:
            traceback.print_exc()
    finally:
        OPENED.watching = False
    inside, beyond = str(folder), (str(outside), "/dev/zero", "/etc/passwd", "/proc/self/mem", "/dev/stdin")
    real = [os.path.realpath(path) for path in OPENED.paths if path.startswith(inside)]
    if SECRET in said or any(path.startswith(beyond) for path in [*OPENED.paths, *real]):
        return OUTSIDE, said[:300]
    if checkpoint is None or result != SAME:
        return result, said
    tensors, experts = contents(checkpoint)
    same = tensors.keys() == base.tensors.keys() and len(experts) == len(base.experts)
    same = same and all(identical(tensors[name], base.tensors[name]) for name in tensors)
    same = same and all(map(identical, experts, base.experts))
    if not same and kind not in ("values of JSON", "kind of files") and not base.digests:
        return UNDETECTABLE, ""
    return (SAME, "") if same else (CHANGED, "")


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def fuzz(work: Path, seed: int, numbers: range, show: bool = False) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by mutation and class, and a line for every fault."""
    outside = work / "outside"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (outside / "secret.json").write_text(json.dumps({"model_type": "qwen3_moe", SECRET: SECRET}))
    (outside / "secret.jinja").write_text(SECRET)
    save_file({SECRET: torch.ones(4, dtype=torch.bfloat16)}, outside / "secret.safetensors")
    folders = bases(work)
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        base, kind = rng.choice(folders), rng.choice(list(MUTATIONS))
        folder = work / "mutant"
        shutil.copytree(base.folder, folder)
        MUTATIONS[kind](folder, rng, outside)
        result, said = outcome(base, folder, outside, kind, show)
        shutil.rmtree(folder)
        counts[kind, result] += 1
        if result in FAULTS:
            faults.append(f"{result}: mutant {number} of {base.folder.name}, {kind}: {said!r}")
        if show:
            print(base.folder.name, kind, result, said[:400])
    return counts, faults


def table(counts: Counter[tuple[str, str]]) -> str:
    """Rows by mutation, columns by class."""
    columns = (REFUSED, SAME, UNDETECTABLE, *FAULTS)
    lines = [" " * 18 + "".join(f"{column:>21}" for column in columns)]
    for kind in MUTATIONS:
        lines.append(f"{kind:18}" + "".join(f"{counts[kind, column]:>21}" for column in columns))
    totals = [sum(count for (_, result), count in counts.items() if result == column) for column in columns]
    return "\n".join([*lines, f"{'all':18}" + "".join(f"{total:>21}" for total in totals)])


def main() -> int:
    """Prints the table and every fault; exit status 1 when there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    numbers = range(options.mutants) if options.only is None else range(options.only, options.only + 1)
    with tempfile.TemporaryDirectory() as work:
        counts, faults = fuzz(Path(work).resolve(), options.seed, numbers, options.only is not None)
    print(table(counts))
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
