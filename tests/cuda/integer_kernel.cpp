// The kernels of cuda/sm90/imma8.cu on the host, for test_integer_kernel.py and words of BITS: built with host_gpu.h in
// place of the headers that hold instructions.
#include "host_gpu.h"
#include "trellis_words.cuh"
#include "sm90/sm90_layer.cuh"

namespace {

using Code = TrellisWords<BITS>;

FewSlotsLayer layer;

template <bool kGateUp>
void product() {
  Sm90Gemm<Code, Imma8, kGateUp>::run(kGateUp ? layer.gate_up : layer.down);
}
void both() { Sm90Layer<Code, FewSlotsTile<Imma8>>::run(layer); }

}  // namespace

extern "C" {

int part_tokens() { return Imma8::kPartTokens; }
int partial_floats() { return kMaxMultiprocessors * Imma8::kBlocks * 16 * Imma8::kStrips * 2 * Imma8::kPartTokens; }
int max_arrivals() { return kMaxArrivals; }
int max_ends() { return kMaxMultiprocessors; }

// In a launch each, or in one.
void multiply(int blocks, bool one_launch, const FewSlotsLayer* given) {
  layer = *given;
  if (one_launch) return run_blocks(blocks, Imma8::kThreads, both, true);
  run_blocks(blocks, Imma8::kThreads, product<true>);
  run_blocks(blocks, Imma8::kThreads, product<false>);
}
}
