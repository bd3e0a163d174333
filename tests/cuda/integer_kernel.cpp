// The kernels of cuda/sm90/imma8.cu on the host, for test_integer_kernel.py and words of BITS: built with host_gpu.h in
// place of the headers that hold instructions.
#include "host_gpu.h"
#include "trellis_words.cuh"
#include "sm90/sm90_gemm.cuh"

namespace {

GroupedGemm gemm;

template <bool kGateUp>
void product() {
  Sm90Gemm<TrellisWords<BITS>, Imma8, kGateUp>::run(gemm);
}

}  // namespace

extern "C" {

int part_tokens() { return Imma8::kPartTokens; }
int partial_floats() { return kMaxMultiprocessors * Imma8::kBlocks * 16 * Imma8::kStrips * 2 * Imma8::kPartTokens; }
int max_arrivals() { return kMaxArrivals; }

void multiply(int blocks, bool gate_up, const GroupedGemm* given) {
  gemm = *given;
  run_blocks(blocks, Imma8::kThreads, gate_up ? product<true> : product<false>);
}
}
