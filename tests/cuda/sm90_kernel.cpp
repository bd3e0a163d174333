// A kernel of cuda/sm90 on the host, for test_sm90_kernels.py: GEMM of a TILE and words of CODE, built with host_gpu.h
// in place of the headers that hold instructions.
#include "host_gpu.h"
#include "trellis_words.cuh"
#include "sm90/sm90_gemm.cuh"
#include "sm90/warp_gemm.cuh"

namespace {

GroupedGemm gemm;

template <bool kGateUp>
void product() {
  GEMM::run(gemm);
}

template <class Tile, int = Tile::kBlocks>
int partial_floats_of(int) {
  return kMaxMultiprocessors * Tile::kBlocks * 16 * Tile::kStrips * 2 * Tile::kPartTokens;
}
template <class>
int partial_floats_of(...) {  // its items are never cut
  return 0;
}

}  // namespace

extern "C" {

int part_tokens() { return TILE::kPartTokens; }
int partial_floats() { return partial_floats_of<TILE>(0); }
int max_arrivals() { return kMaxArrivals; }

void multiply(int blocks, bool gate_up, const GroupedGemm* given) {
  gemm = *given;
  run_blocks(blocks, TILE::kThreads, gate_up ? product<true> : product<false>);
}
}
