#include "gemm_hopper.cuh"

#include "kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = gemm_hopper<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = HopperKernel<Code, Tile, kGateUp>::kSharedBytes;
};

struct Bulk16 : HopperTile<2, 2, 128> {
  static constexpr bool kWgmma = false, kCuts = true;
  static constexpr int kPartTokens = 16, kWidthStep = 8, kFenceLag = 0;
};
struct Wgmma32 : HopperTile<4, 1, 256> {
  static constexpr bool kWgmma = true, kCuts = true;
  static constexpr int kPartTokens = 32, kWidthStep = 16, kFenceLag = 2;
};
struct Wgmma64 : HopperTile<2, 1, 128> {
  static constexpr bool kWgmma = true, kCuts = false;
  static constexpr int kPartTokens = 64, kWidthStep = 32, kFenceLag = 0;
};
struct Wgmma128 : HopperTile<2, 1, 128> {
  static constexpr bool kWgmma = true, kCuts = false;
  static constexpr int kPartTokens = 128, kWidthStep = 64, kFenceLag = 0;
};

// Of the sums that all blocks of a launch may leave.
template <class Tile>
constexpr int partial_floats() {
  static_assert(Tile::kBlocks * Tile::kConsumers <= kMaxWarpgroups);
  return Tile::kCuts ? kMaxMultiprocessors * Tile::kBlocks * 16 * Tile::kStrips * 2 * Tile::kPartTokens : 0;
}

}  // namespace

extern const Kernel kHopperKernels[] = {
    {"bulk16", Bulk16::kPartTokens, partial_floats<Bulk16>(), 90, 90, launch<Gemm, Bulk16>},
    {"wgmma32", Wgmma32::kPartTokens, partial_floats<Wgmma32>(), 90, 90, launch<Gemm, Wgmma32>},
    {"wgmma64", Wgmma64::kPartTokens, partial_floats<Wgmma64>(), 90, 90, launch<Gemm, Wgmma64>},
    {"wgmma128", Wgmma128::kPartTokens, partial_floats<Wgmma128>(), 90, 90, launch<Gemm, Wgmma128>},
};
extern const int kHopperKernelCount = sizeof kHopperKernels / sizeof *kHopperKernels;
