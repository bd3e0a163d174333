"""The CUDA library: kernels for compute capability 8.0 and later, called through its C interface.

The library is `libpuzzlemoe_cuda.so` beside the package's modules, or the file that PUZZLEMOE_CUDA_LIBRARY names.  It
is loaded at first use and links no torch, so one build serves every torch and Python.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from puzzlemoe_vllm.backends import ExpertWeights, wants_fp8_prefill
from puzzlemoe_vllm.backends.cuda_self_check import find_fault
from puzzlemoe_vllm.format.codes import CODES, Decoder, PairCode, TableCode, TrellisCode, get_code
from puzzlemoe_vllm.format.codes.table import ByteSums

logger = logging.getLogger(__name__)

ABI_VERSION = 10
READS_CHECKPOINT_ORDER = False
LIBRARY_VARIABLE = "PUZZLEMOE_CUDA_LIBRARY"
CALL_TOKENS = 32768
"""More are multiplied in several calls: scratch holds the hidden activations and the outputs of every slot."""

DISPATCH = Path(__file__).with_name("cuda_dispatch.json")
"""Which kernel serves how many tokens; written by `benchmarks/kernels.py --tune`."""


class Unavailable(RuntimeError):
    """Why the CUDA library cannot be used."""


class _Layer(ctypes.Structure):
    """`pm_layer` of cuda/puzzlemoe.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "topk_weights", "topk_ids", "expert_map")),
        *((name, ctypes.c_void_p) for name in ("w13_pairs", "w2_pairs", "w13_steps", "w2_steps")),
        *((name, ctypes.c_void_p) for name in ("table", "w13_dense", "w2_dense", "out", "scratch")),
        *((name, ctypes.c_int32) for name in ("tokens", "topk", "hidden", "intermediate", "pairs", "dense")),
        *((name, ctypes.c_int32) for name in ("code", "group_size", "kernel")),
        ("fp8_levels", ctypes.c_uint8 * 8),
        ("fp8_directions", ctypes.c_uint8 * 16),
        ("fp8_unit", ctypes.c_float),
    ]


def library_path() -> Path:
    """Where the library is looked for."""
    return Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parents[1] / "libpuzzlemoe_cuda.so")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The loaded library.  Raises Unavailable saying what is wrong with the file."""
    path = library_path()
    if not path.is_file():
        raise Unavailable(f"{path} does not exist: the package was installed without nvcc; set CUDA_HOME and reinstall")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error
    version = library.pm_abi_version()
    if version != ABI_VERSION:
        raise Unavailable(f"{path} has ABI {version}, this package needs {ABI_VERSION}: reinstall puzzlemoe-vllm")
    library.pm_last_error.restype = ctypes.c_char_p
    library.pm_kernel_name.restype = ctypes.c_char_p
    library.pm_scratch_bytes.argtypes = [ctypes.POINTER(_Layer)]
    library.pm_scratch_bytes.restype = ctypes.c_int64
    library.pm_fused_experts.argtypes = [ctypes.POINTER(_Layer), ctypes.c_void_p]
    library.pm_trellis_scratch_bytes.argtypes = [ctypes.c_int32, ctypes.c_int64]
    library.pm_trellis_scratch_bytes.restype = ctypes.c_int64
    library.pm_trellis_encode.argtypes = [
        *(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    ]
    return library


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the library cannot serve a device, the current GPU by default, or None when it can.

    The first time that a device is asked about, its kernels multiply small layers.
    """
    if not torch.cuda.is_available() or torch.version.hip or (device is not None and device.type != "cuda"):
        return f"{device or 'this machine'} is not an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    try:
        load_library()
    except Unavailable as reason:
        return str(reason)
    index = None if device is None else device.index
    return _fault(torch.cuda.current_device() if index is None else index)


@functools.cache
def _fault(index: int) -> str | None:
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)

    def kernels(code: PairCode) -> set[str]:
        return {kernel for _, kernel in _dispatch_rows(served_capability(10 * major + minor), kind_of(code))}

    def fp8_kernels(code: PairCode) -> set[str]:
        row = _fp8_row(10 * major + minor)
        with torch.cuda.device(device):
            return {row[1]} if row and wants_fp8_prefill() and why_no_fp8(code) is None else set()

    fault = find_fault(device, kernels, fp8_kernels, prepare, fused_experts)
    return fault and f"{library_path()} failed its check on {torch.cuda.get_device_name(device)}: {fault}"


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """The library's kernels, in the order of their numbers."""
    library = load_library()
    return tuple(library.pm_kernel_name(index).decode() for index in range(library.pm_kernel_count()))


def _kernel_number(kernel: str) -> int:
    if kernel not in kernel_names():
        raise ValueError(f"{library_path()} has no kernel {kernel}, but {', '.join(kernel_names())}")
    return kernel_names().index(kernel)


def kernel_takes(kernel: str, code: PairCode) -> bool:
    """Whether a kernel of the library multiplies words of a code.  Raises ValueError for a name of no kernel."""
    library, number = load_library(), _kernel_number(kernel)
    in_its_numbers = not library.pm_kernel_is_fp8(number) or _byte_sums(code) is not None
    return in_its_numbers and bool(library.pm_kernel_takes(number, int(code.decoder)))


def runnable_kernels(device: torch.device, code: PairCode, fp8: bool = False) -> list[str]:
    """The kernels that multiply words of a code and that this device can run: those that multiply in bf16, or those
    that multiply merged experts in e4m3."""
    library = load_library()
    with torch.cuda.device(device):
        return [
            name
            for number, name in enumerate(kernel_names())
            if bool(library.pm_kernel_is_fp8(number)) == fp8
            and kernel_takes(name, code)
            and library.pm_kernel_runs(number)
        ]


@functools.cache
def _dispatch_rows(capability: int, kind: str) -> list[tuple[float, str]]:
    tables = json.loads(DISPATCH.read_text())["kernels"]
    table = tables[str(capability)] if str(capability) in tables else tables["other"]
    return [(float(row["slots_per_expert"]), row["kernel"]) for row in table[kind]]


def kind_of(code: PairCode) -> str:
    """Whose times in the dispatch table serve a code: `trellis`, `table` of others with steps, else `16-bit`."""
    if isinstance(code, TrellisCode):
        return "trellis"
    return "table" if code.has_steps else "16-bit"


def _byte_sums(code: PairCode) -> ByteSums | None:
    """What a code's words are in e4m3, None for codes that have no such values."""
    return code.sums if isinstance(code, TableCode) else None


def why_no_fp8(code: PairCode) -> str | None:
    """Why the current GPU, which the library serves, cannot multiply words of a code in e4m3, or None when it can."""
    if _byte_sums(code) is None:
        return f"words of {code.name} have no values in e4m3"
    major, minor = torch.cuda.get_device_capability()
    row = _fp8_row(10 * major + minor)
    if row is None:
        return f"there are no e4m3 kernels for compute capability {major}.{minor}"
    if row[1] not in kernel_names():
        return f"{library_path()} was built without {row[1]}; build it with CUDA 13.3 or later"
    return None


@functools.cache
def _fp8_row(capability: int) -> tuple[float, str] | None:
    """Above how many slots per expert which kernel multiplies in e4m3 where that is asked for."""
    row = json.loads(DISPATCH.read_text())["fp8_prefill"].get(str(capability))
    return row and (float(row["above_slots_per_expert"]), row["kernel"])


def choose_kernel(slots_per_expert: float, capability: int, code: PairCode, fp8: bool = False) -> str:
    """The kernel for a layer whose experts are chosen `slots_per_expert` times on average.

    capability: compute capability without its dot, 90 for an H100.  fp8: many tokens may be multiplied in e4m3.
    """
    if fp8 and (row := _fp8_row(capability)) and slots_per_expert > row[0]:
        return row[1]
    rows = _dispatch_rows(capability, kind_of(code))
    return next((kernel for limit, kernel in rows if slots_per_expert <= limit), rows[-1][1])


@functools.cache
def served_capability(capability: int) -> int:
    """The capability whose rows of the dispatch table the loaded library can serve.

    80, whose kernels run on every later device, where the library was built without some that `capability` asks for:
    cuda/build.py says when.
    """
    wanted = {kernel for code in CODES.values() for _, kernel in _dispatch_rows(capability, kind_of(code))}
    missing = sorted(wanted - set(kernel_names()))
    if not missing:
        return capability
    logger.warning(
        "%s was built without %s: kernels of compute capability 8.0 serve instead, slower; build it with CUDA 13.3 or "
        "later",
        library_path(),
        ", ".join(missing),
    )
    return 80


def kernel_words(tiles: Tensor, code: PairCode) -> Tensor:
    """Tiles of one word per element, [..., 256], in the bit order that the kernels read (cuda/words.cuh and
    trellis_words.cuh): int16 for the 16-bit codes, else uint8 [..., bytes of a tile]."""
    decoder = code.decoder
    if isinstance(code, TrellisCode):
        return _trellis_words(tiles, code.bits)
    if decoder is Decoder.MASK16:
        swapped = ((tiles >> 13) & 1) << 14 | ((tiles >> 14) & 1) << 13
        return (tiles & ~0x6000) | swapped
    if decoder is not Decoder.TABLE6:
        return tiles
    first, second = tiles.unflatten(-1, (32, 2, 4)).unbind(-2)
    three_bytes = [
        torch.stack([w[..., 0] | w[..., 1] << 6, w[..., 1] >> 2 | w[..., 2] << 4, w[..., 2] >> 4 | w[..., 3] << 2], -1)
        for w in (first, second)
    ]
    lower, upper = torch.cat(three_bytes, dim=-1).split((4, 2), dim=-1)
    return torch.cat([lower.flatten(-2), upper.flatten(-2)], dim=-1)


def _trellis_words(tiles: Tensor, bits: int) -> Tensor:
    """Of words in tiles [..., 256], the bytes of a tile as cuda/trellis_words.cuh says, uint8 [..., 32 * bits]."""
    # [..., lane, run, word] of [..., lane, right half, lower half, 2]
    words = tiles.unflatten(-1, (32, 2, 2, 2)).transpose(-2, -3).flatten(-2).long()
    runs = (words << bits * torch.arange(4, device=tiles.device)).sum(dim=-1)
    if bits == 8:
        planes = [(runs, 4)]
    elif bits <= 4:  # of two tiles
        even, odd = runs.unflatten(-3, (-1, 2)).unbind(-3)
        runs = even | odd << 4 * bits
        both = runs[..., :1] | runs[..., 1:] << 24
        planes = [(runs, 4)] if bits == 4 else [(both & 0xFFFFFFFF, 4), (both >> 32, 2)]
    else:
        left = 4 * bits - 16
        rest = (runs & (1 << left) - 1) << left * torch.arange(2, device=tiles.device)
        planes = [(runs >> left, 2), (rest.sum(dim=-1, keepdim=True), left // 4)]
    as_bytes = (number[..., None] >> 8 * torch.arange(size, device=tiles.device) & 255 for number, size in planes)
    words = torch.cat([plane.flatten(-3) for plane in as_bytes], dim=-1).to(torch.uint8)
    return words if bits > 4 else words.unflatten(-1, (2, -1)).flatten(-3, -2)


def tile(matrix: Tensor, gate_up: bool) -> Tensor:
    """A [N, K] matrix in the order of cuda/words.cuh, as [N/16, K/16, 256]; N and K multiples of 16.

    gate_up: the first half of the rows are the gate's and the second half the up projection's.
    """
    rows, columns = matrix.shape
    shape = (2, rows // 16, 8) if gate_up else (rows // 16, 2, 8)
    tiles = matrix.view(*shape, columns // 16, 2, 4, 2)
    half, strip = (0, 1) if gate_up else (1, 0)
    return tiles.permute(strip, 3, 2, 5, 4, half, 6).reshape(rows // 16, columns // 16, 256)


def blocks(tiles: Tensor) -> Tensor:
    """Tiles [N/16, K/16, ...] in the order in which the kernels read them, by blocks of 8 strips x 4 tiles: see
    cuda/words.cuh.

    Returns a copy of the same size, one-dimensional.
    """
    pieces = []
    for strips in tiles.split(tiles.shape[0] // 8 * 8 or 8):
        strips = strips.unflatten(0, (-1, min(8, strips.shape[0])))
        whole = strips.shape[2] // 4 * 4
        by_block = [strips[:, :, :whole].unflatten(2, (-1, 4)).transpose(1, 2), strips[:, :, whole:]]
        pieces.append(torch.cat([part.flatten(1) for part in by_block], dim=1).flatten())
    return torch.cat(pieces)


def tile_steps(steps: Tensor, gate_up: bool) -> Tensor:
    """Steps [N, groups] in the order of cuda/words.cuh, [groups, N/16, 8, 2]."""
    rows, groups = steps.shape
    if gate_up:
        return steps.view(2, rows // 16, 8, groups).permute(3, 1, 2, 0)
    return steps.view(rows // 16, 2, 8, groups).permute(3, 0, 2, 1)


def prepare(weights: ExpertWeights) -> None:
    """Rewrites a layer's weights, as they were loaded, into the order that the kernels read.  In place, one matrix at a
    time: the extra memory is a few copies of one expert's largest matrix."""
    code = get_code(weights.code)
    code.word_table(weights.w13_pairs.device)  # no graph capture could fetch it
    for words, steps, dense, gate_up in (
        (weights.w13_pairs, weights.w13_steps, weights.w13_dense, True),
        (weights.w2_pairs, weights.w2_steps, weights.w2_dense, False),
    ):
        for matrix in words.detach():
            matrix.copy_(blocks(kernel_words(tile(code.unpack(matrix), gate_up), code)).view_as(matrix))
        for matrix in dense.detach():
            matrix.copy_(blocks(tile(matrix, gate_up)).view_as(matrix))
        for matrix in steps.detach() if steps is not None else ():
            matrix.copy_(tile_steps(matrix, gate_up).reshape(matrix.shape))


def fused_experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: ExpertWeights, kernel: str | None = None
) -> Tensor:
    """sum_k topk_weights[m, k] * down(SiLU(gate x) * up x) over the local experts of row m, on prepared weights.

    x: bf16 [M, H]; topk_weights float32 [M, k], k at most 32; topk_ids [M, k], below 0: skip.  kernel: one of
    `kernel_names()` instead of the dispatch table's and PUZZLEMOE_FP8_PREFILL's.  Returns bf16 [M, H]; inputs are not
    written.  Raises Unavailable without the library, and ValueError or RuntimeError saying what it cannot run.
    """
    if x.dtype != torch.bfloat16:
        raise ValueError(f"the CUDA kernels take bfloat16 activations, not {x.dtype}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pieces = [tensor.split(CALL_TOKENS) for tensor in (x, topk_weights, topk_ids, out)]
    with torch.cuda.device(x.device):
        for rows, their_weights, their_ids, their_out in zip(*pieces, strict=True):
            _call(rows, their_weights, their_ids, their_out, weights, kernel)
    return out


def _call(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor, weights: ExpertWeights, kernel: str | None
) -> None:
    """One call of the library, on the current device and stream, that writes `out`."""
    library, code = load_library(), get_code(weights.code)
    tokens, topk = topk_ids.shape
    hidden, intermediate = x.shape[1], weights.w2_dense.shape[2]
    if kernel is None:
        experts = weights.total if weights.expert_map is None else weights.expert_map.numel()
        major, minor = torch.cuda.get_device_capability()
        kernel = choose_kernel(
            tokens * topk / experts, served_capability(10 * major + minor), code, wants_fp8_prefill()
        )
    # Held here until the launches are queued: the allocator reuses memory in stream order.
    inputs = {
        "x": x.contiguous(),
        "topk_weights": topk_weights.to(torch.float32).contiguous(),
        "topk_ids": topk_ids.to(torch.int32).contiguous(),
        "w13_pairs": weights.w13_pairs,
        "w2_pairs": weights.w2_pairs,
        "w13_dense": weights.w13_dense,
        "w2_dense": weights.w2_dense,
        "out": out,
    }
    table = code.word_table(x.device)
    if weights.w13_steps is not None and weights.w2_steps is not None:
        inputs |= {"w13_steps": weights.w13_steps, "w2_steps": weights.w2_steps}
    if table is not None:
        inputs["table"] = table
    if weights.expert_map is not None:
        inputs["expert_map"] = weights.expert_map
    layer = _Layer(
        **{name: tensor.data_ptr() for name, tensor in inputs.items()},
        tokens=tokens,
        topk=topk,
        hidden=hidden,
        intermediate=intermediate,
        pairs=weights.w13_pairs.shape[0],
        dense=weights.w13_dense.shape[0],
        code=code.decoder,
        group_size=0 if weights.w13_steps is None else hidden // weights.w13_steps.shape[2],
        kernel=_kernel_number(kernel),
    )
    if sums := _byte_sums(code):
        layer.fp8_levels[:] = sums.e4m3_levels
        layer.fp8_directions[:] = sums.both_directions
        layer.fp8_unit = sums.e4m3_unit
    # Below 0 where the call fails; that says why.
    scratch = torch.empty(max(library.pm_scratch_bytes(layer), 0), dtype=torch.uint8, device=x.device)
    layer.scratch = scratch.data_ptr()
    if library.pm_fused_experts(layer, torch.cuda.current_stream().cuda_stream):
        raise RuntimeError(f"puzzlemoe CUDA kernels: {library.pm_last_error().decode()}")
