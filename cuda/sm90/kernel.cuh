// How a source makes the kernel of one tile: each has its own, so that they are compiled at the same time.
#pragma once
#include "../kernels.cuh"
#include "sm90_gemm.cuh"

template <class Code, class Tile, bool kGateUp>
struct Sm90Product {
  static constexpr auto kFunction = sm90_gemm<Code, Tile, kGateUp>;
  static constexpr int kSharedBytes = Stages<Code, Tile, kGateUp>::kSharedBytes;
};

// Of the sums that all blocks of a launch may leave.
template <class Tile>
constexpr int partial_floats() {
  static_assert(Tile::kBlocks * Tile::kConsumers <= kMaxWarpgroups);
  return Tile::kCuts ? kMaxMultiprocessors * Tile::kBlocks * 16 * Tile::kStrips * 2 * Tile::kPartTokens : 0;
}

template <class Tile, uint32_t kCodes = kAllCodes>
constexpr Kernel sm90_kernel(const char* name) {
  static_assert(kCodes & codes(PM_CODE_MASK16), "its decoder is the one that reads dense experts");
  return {name, Tile::kPartTokens, partial_floats<Tile>(), 90, 90, kCodes, launch_product<Sm90Product, Tile, kCodes>};
}
