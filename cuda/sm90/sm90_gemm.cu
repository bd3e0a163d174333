#include "sm90_gemm.cuh"

#include "../kernels.cuh"

namespace {

template <class Code, class Tile, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = sm90_gemm<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = Stages<Code, Tile, kGateUp>::kSharedBytes;
};

// Of the sums that all blocks of a launch may leave.
template <class Tile>
constexpr int partial_floats() {
  static_assert(Tile::kBlocks * Tile::kConsumers <= kMaxWarpgroups);
  return Tile::kCuts ? kMaxMultiprocessors * Tile::kBlocks * 16 * Tile::kStrips * 2 * Tile::kPartTokens : 0;
}

template <class Tile>
constexpr Kernel kernel(const char* name) {
  return {name, Tile::kPartTokens, partial_floats<Tile>(), 90, 90, launch<Gemm, Tile>};
}

}  // namespace

extern const Kernel sm90_mma16 = kernel<Mma16>("sm90_mma16");
extern const Kernel sm90_wgmma32 = kernel<Wgmma32>("sm90_wgmma32");
extern const Kernel sm90_wgmma64 = kernel<Wgmma64>("sm90_wgmma64");
extern const Kernel sm90_wgmma128 = kernel<Wgmma128>("sm90_wgmma128");
