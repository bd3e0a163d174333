"""Trellis words of targets by the CUDA library, on a GPU that `puzzlemoe_vllm.backends.cuda` can use."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzlemoe_vllm.backends.cuda import load_library
from puzzlemoe_vllm.format.codes import UnencodableWeight
from puzzlemoe_vllm.format.codes.trellis import PLACES, TrellisCode


def encode(code: TrellisCode, targets: Tensor, weights: Tensor) -> Tensor:
    """Stored words uint8 [tiles, 32 * bits] whose values are near the targets: Viterbi with fp16 costs.

    targets: float32 [tiles, 256, 2] in units of the values; weights: float32 of the same shape, 0 or more, of the
    squared errors; both in the order of the places.  Tiles share work: 2,000 and more in a call are coded fastest.
    Raises UnencodableWeight for a target that is NaN or infinite, ValueError for such a weight or one below 0, and
    RuntimeError with the library's reason where it fails.
    """
    tiles = targets.shape[0]
    assert targets.shape == weights.shape == (tiles, PLACES, 2) and targets.is_cuda
    if not torch.isfinite(targets).all():
        raise UnencodableWeight("a weight is NaN or infinite")
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("weights of squared errors must be finite and not below 0")
    targets, weights = targets.float().contiguous(), weights.float().contiguous()
    library = load_library()
    with torch.cuda.device(targets.device):
        words = torch.empty(tiles, PLACES // 8 * code.bits, dtype=torch.uint8, device=targets.device)
        size = max(library.pm_trellis_scratch_bytes(code.bits, tiles), 0)
        scratch = torch.empty(size, dtype=torch.uint8, device=targets.device)
        stream = torch.cuda.current_stream().cuda_stream
        pointers = words.data_ptr(), scratch.data_ptr(), stream
        if library.pm_trellis_encode(code.bits, targets.data_ptr(), weights.data_ptr(), tiles, *pointers):
            raise RuntimeError(f"trellis encoder: {library.pm_last_error().decode()}")
    return words
