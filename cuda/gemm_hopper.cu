#include "gemm_hopper.cuh"

#include "kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = gemm_hopper<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = HopperKernel<Code, Tile, kGateUp>::kSharedBytes;
};

// wgmma or not, tokens a part, step of widths, strips a warp, cuts items, blocks on a multiprocessor.
using Bulk16 = HopperTile<false, 16, 8, 1, true, 2>;
using Bulk24 = HopperTile<false, 24, 8, 1, true, 2>;
using Wgmma64 = HopperTile<true, 64, 32, 1, false, 1>;
using Wgmma128 = HopperTile<true, 128, 64, 1, false, 1>;

}  // namespace

extern const Kernel kHopperKernels[] = {
    {"bulk16", Bulk16::kPartTokens, Bulk16::kPieceFloats, 90, 90, launch<Gemm, Bulk16>},
    {"bulk24", Bulk24::kPartTokens, Bulk24::kPieceFloats, 90, 90, launch<Gemm, Bulk24>},
    {"wgmma64", Wgmma64::kPartTokens, Wgmma64::kPieceFloats, 90, 90, launch<Gemm, Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, Wgmma128::kPieceFloats, 90, 90, launch<Gemm, Wgmma128>},
};
extern const int kHopperKernelCount = sizeof kHopperKernels / sizeof *kHopperKernels;
