#include "gemm_hopper.cuh"

#include "kernels.cuh"
#include "puzzlemoe.h"

namespace {

template <class Code, class Tile, bool kGateUp>
cudaError_t launch_kernel(const GroupedGemm& gemm, cudaStream_t stream) {
  constexpr auto kernel = gemm_hopper<Code, Tile, kGateUp>;
  constexpr int kSharedBytes = HopperKernel<Code, Tile, kGateUp>::kSharedBytes;
  static std::atomic<int> known[kMaxDevices];
  int blocks;
  if (cudaError_t error = resident_blocks(kernel, Tile::kThreads, kSharedBytes, known, blocks)) return error;
  return launch_early(kernel, blocks, Tile::kThreads, kSharedBytes, stream, gemm);
}

template <class Code, class Tile>
cudaError_t launch_product(bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  return gate_up ? launch_kernel<Code, Tile, true>(gemm, stream) : launch_kernel<Code, Tile, false>(gemm, stream);
}

template <class Tile>
cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_MASK16: return launch_product<Mask16, Tile>(gate_up, gemm, stream);
    case PM_CODE_ANGLE16: return launch_product<Angle16, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE8: return launch_product<TableWords<8>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE6: return launch_product<TableWords<6>, Tile>(gate_up, gemm, stream);
  }
  return cudaErrorInvalidValue;
}

// wgmma or not, tokens a part, step of widths, splits, blocks on a multiprocessor.
using Bulk16 = HopperTile<false, 16, 8, 4, 2>;
using Bulk32 = HopperTile<false, 32, 16, 4, 2>;
using Wgmma32 = HopperTile<true, 32, 16, 4, 1>;
using Wgmma64 = HopperTile<true, 64, 32, 1, 1>;
using Wgmma128 = HopperTile<true, 128, 64, 1, 1>;

}  // namespace

extern const Kernel kHopperKernels[] = {
    {"bulk16", Bulk16::kPartTokens, Bulk16::kMaxSplits > 1, 90, 90, launch<Bulk16>},
    {"bulk32", Bulk32::kPartTokens, Bulk32::kMaxSplits > 1, 90, 90, launch<Bulk32>},
    {"wgmma32", Wgmma32::kPartTokens, Wgmma32::kMaxSplits > 1, 90, 90, launch<Wgmma32>},
    {"wgmma64", Wgmma64::kPartTokens, Wgmma64::kMaxSplits > 1, 90, 90, launch<Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, Wgmma128::kMaxSplits > 1, 90, 90, launch<Wgmma128>},
};
extern const int kHopperKernelCount = sizeof kHopperKernels / sizeof *kHopperKernels;
