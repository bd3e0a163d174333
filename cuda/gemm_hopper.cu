#include "gemm_hopper.cuh"

#include "kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = gemm_hopper<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = HopperKernel<Code, Tile, kGateUp>::kSharedBytes;
};

// wgmma or not, tokens a part, step of widths, splits, blocks on a multiprocessor.
using Bulk16 = HopperTile<false, 16, 8, 4, 2>;
using Bulk32 = HopperTile<false, 32, 16, 4, 2>;
using Wgmma32 = HopperTile<true, 32, 16, 4, 1>;
using Wgmma64 = HopperTile<true, 64, 32, 1, 1>;
using Wgmma128 = HopperTile<true, 128, 64, 1, 1>;

}  // namespace

extern const Kernel kHopperKernels[] = {
    {"bulk16", Bulk16::kPartTokens, Bulk16::kMaxSplits > 1, 90, 90, launch<Gemm, Bulk16>},
    {"bulk32", Bulk32::kPartTokens, Bulk32::kMaxSplits > 1, 90, 90, launch<Gemm, Bulk32>},
    {"wgmma32", Wgmma32::kPartTokens, Wgmma32::kMaxSplits > 1, 90, 90, launch<Gemm, Wgmma32>},
    {"wgmma64", Wgmma64::kPartTokens, Wgmma64::kMaxSplits > 1, 90, 90, launch<Gemm, Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, Wgmma128::kMaxSplits > 1, 90, 90, launch<Gemm, Wgmma128>},
};
extern const int kHopperKernelCount = sizeof kHopperKernels / sizeof *kHopperKernels;
