// A kernel of cuda/sm90 on the host, for test_sm90_kernels.py, of a TILE and words of CODE: built with host_gpu.h in
// place of the headers that hold instructions.
#include "host_gpu.h"
#include "trellis_words.cuh"
#include "sm90/sm90_gemm.cuh"

namespace {

GroupedGemm gemm;

template <bool kGateUp>
void product() {
  Sm90Gemm<CODE, TILE, kGateUp>::run(gemm);
}

}  // namespace

extern "C" {

int part_tokens() { return TILE::kPartTokens; }
int partial_floats() { return kMaxMultiprocessors * TILE::kBlocks * 16 * TILE::kStrips * 2 * TILE::kPartTokens; }
int max_arrivals() { return kMaxArrivals; }

void multiply(int blocks, bool gate_up, const GroupedGemm* given) {
  gemm = *given;
  run_blocks(blocks, TILE::kThreads, gate_up ? product<true> : product<false>);
}
}
