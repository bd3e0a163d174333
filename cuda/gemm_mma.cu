#include "gemm_mma.cuh"

#include "kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = gemm_mma<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = MmaKernel<Code, Tile, kGateUp>::kSharedBytes;
};

// Tokens a part, warps over rows, warps over depth, strips a warp, depth, stages: 8 KB of mask16 words and 8 KB of
// tokens a stage (16 and 16 in the last).
using Mma8 = MmaTile<8, 1, 8, 1, 256, 5>;
using Mma16 = MmaTile<16, 2, 4, 1, 128, 5>;
using Mma32 = MmaTile<32, 4, 2, 1, 64, 5>;
using Mma64 = MmaTile<64, 4, 1, 2, 64, 3>;

}  // namespace

extern const Kernel kMmaKernels[] = {
    {"mma8", Mma8::kPartTokens, 0, 80, 999, launch<Gemm, Mma8>},
    {"mma16", Mma16::kPartTokens, 0, 80, 999, launch<Gemm, Mma16>},
    {"mma32", Mma32::kPartTokens, 0, 80, 999, launch<Gemm, Mma32>},
    {"mma64", Mma64::kPartTokens, 0, 80, 999, launch<Gemm, Mma64>},
};
extern const int kMmaKernelCount = sizeof kMmaKernels / sizeof *kMmaKernels;
