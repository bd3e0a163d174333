#include "sm80_gemm.cuh"

#include "kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = sm80_gemm<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = Sm80Gemm<Code, Tile, kGateUp>::kSharedBytes;
};

// Tokens a part, warps over rows, warps over depth, strips a warp, depth, stages: 8 KB of mask16 words and 8 KB of
// tokens a stage (16 and 16 in the last).
using Mma8 = Sm80Tile<8, 1, 8, 1, 256, 5>;
using Mma16 = Sm80Tile<16, 2, 4, 1, 128, 5>;
using Mma32 = Sm80Tile<32, 4, 2, 1, 64, 5>;
using Mma64 = Sm80Tile<64, 4, 1, 2, 64, 3>;

template <class Tile>
constexpr Kernel kernel(const char* name) {
  return {name, Tile::kPartTokens, 0, 80, 999, kAllCodes, launch_product<Gemm, Tile, kAllCodes>};
}

}  // namespace

extern const Kernel sm80_mma8 = kernel<Mma8>("sm80_mma8");
extern const Kernel sm80_mma16 = kernel<Mma16>("sm80_mma16");
extern const Kernel sm80_mma32 = kernel<Mma32>("sm80_mma32");
extern const Kernel sm80_mma64 = kernel<Mma64>("sm80_mma64");
