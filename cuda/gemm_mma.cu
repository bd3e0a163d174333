#include "gemm_mma.cuh"

#include "kernels.cuh"
#include "puzzlemoe.h"

namespace {

template <class Code, class Tile, bool kGateUp>
cudaError_t launch_kernel(const GroupedGemm& gemm, cudaStream_t stream) {
  constexpr auto kernel = gemm_mma<Code, Tile, kGateUp>;
  constexpr int kSharedBytes = MmaKernel<Code, Tile, kGateUp>::kSharedBytes;
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

// Tokens a part, warps over rows, warps over depth, strips a warp, depth, stages: 8 KB of mask16 words and 8 KB of
// tokens a stage (16 and 16 in the last).
using Mma8 = MmaTile<8, 1, 8, 1, 256, 5>;
using Mma16 = MmaTile<16, 2, 4, 1, 128, 5>;
using Mma32 = MmaTile<32, 4, 2, 1, 64, 5>;
using Mma64 = MmaTile<64, 4, 1, 2, 64, 3>;

}  // namespace

extern const Kernel kMmaKernels[] = {
    {"mma8", Mma8::kPartTokens, false, 80, 999, launch<Mma8>},
    {"mma16", Mma16::kPartTokens, false, 80, 999, launch<Mma16>},
    {"mma32", Mma32::kPartTokens, false, 80, 999, launch<Mma32>},
    {"mma64", Mma64::kPartTokens, false, 80, 999, launch<Mma64>},
};
extern const int kMmaKernelCount = sizeof kMmaKernels / sizeof *kMmaKernels;
