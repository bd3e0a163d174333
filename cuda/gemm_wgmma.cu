#include "gemm_wgmma.cuh"

#include "kernels.cuh"
#include "puzzlemoe.h"

namespace {

template <class Code, class Tile, bool kGateUp>
cudaError_t launch_kernel(const GroupedGemm& gemm, cudaStream_t stream) {
  constexpr auto kernel = gemm_wgmma<Code, Tile, kGateUp>;
  constexpr int kSharedBytes = WgmmaKernel<Code, Tile, kGateUp>::kSharedBytes;
  static std::atomic<int> known[kMaxDevices];
  int blocks;
  if (cudaError_t error = resident_blocks(kernel, Tile::kThreads, kSharedBytes, known, blocks)) return error;
  return launch_early(kernel, blocks, Tile::kThreads, kSharedBytes, stream, gemm);
}

template <class Tile>
cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_MASK16:
      return gate_up ? launch_kernel<Mask16, Tile, true>(gemm, stream)
                     : launch_kernel<Mask16, Tile, false>(gemm, stream);
  }
  return cudaErrorInvalidValue;
}

// Tokens a part, step of widths, stages, splits.
using Wgmma16 = WgmmaTile<16, 8, 10, 4>;
using Wgmma32 = WgmmaTile<32, 16, 8, 4>;
using Wgmma64 = WgmmaTile<64, 32, 6, 1>;
using Wgmma128 = WgmmaTile<128, 64, 4, 1>;

}  // namespace

extern const Kernel kWgmmaKernels[] = {
    {"wgmma16", Wgmma16::kPartTokens, Wgmma16::kMaxSplits > 1, 90, 90, launch<Wgmma16>},
    {"wgmma32", Wgmma32::kPartTokens, Wgmma32::kMaxSplits > 1, 90, 90, launch<Wgmma32>},
    {"wgmma64", Wgmma64::kPartTokens, Wgmma64::kMaxSplits > 1, 90, 90, launch<Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, Wgmma128::kMaxSplits > 1, 90, 90, launch<Wgmma128>},
};
extern const int kWgmmaKernelCount = sizeof kWgmmaKernels / sizeof *kWgmmaKernels;
