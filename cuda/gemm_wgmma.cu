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
  kernel<<<blocks, Tile::kThreads, kSharedBytes, stream>>>(gemm);
  return cudaGetLastError();
}

template <class Tile>
cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_MASK16:
      return gate_up ? launch_kernel<Mask16, Tile, true>(gemm, stream) : launch_kernel<Mask16, Tile, false>(gemm, stream);
  }
  return cudaErrorInvalidValue;
}

using Wgmma32 = WgmmaTile<32, 8>;
using Wgmma64 = WgmmaTile<64, 6>;
using Wgmma128 = WgmmaTile<128, 4>;

}  // namespace

extern const Kernel kWgmmaKernels[] = {
    {"wgmma32", Wgmma32::kPartTokens, 90, 90, launch<Wgmma32>},
    {"wgmma64", Wgmma64::kPartTokens, 90, 90, launch<Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, 90, 90, launch<Wgmma128>},
};
extern const int kWgmmaKernelCount = sizeof kWgmmaKernels / sizeof *kWgmmaKernels;
