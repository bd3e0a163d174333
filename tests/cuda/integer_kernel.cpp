// The kernel of cuda/sm90/imma8.cu on the host, for test_integer_kernel.py and words of BITS: built with host_gpu.h in
// place of the headers that hold instructions.
#include "host_gpu.h"
#include "trellis_words.cuh"
#include "sm90/sm90_gemm.cuh"

namespace {

GroupedGemm gemm;

template <bool kGateUp>
void kernel() {
  Sm90Gemm<TrellisWords<BITS>, Imma8, kGateUp>::run(gemm);
}

}  // namespace

extern "C" {

int part_tokens() { return Imma8::kPartTokens; }
int partial_floats() { return kMaxMultiprocessors * Imma8::kBlocks * 16 * Imma8::kStrips * 2 * Imma8::kPartTokens; }
int max_arrivals() { return kMaxArrivals; }
// Returns how many bytes of the next launch's words, of as many pairs, are fetched early.
int64_t multiply(int gate_up, int blocks, int pairs, const GroupedGemm* given) {
  gemm = *given, fetched = 0, fetchable = gemm.next_words;
  const int64_t tiles = int64_t(gemm.next_rows / 16) * (gemm.next_depth / 16);
  fetchable_end = fetchable + pairs * tiles * TrellisWords<BITS>::kTileBytes;
  run_blocks(blocks, Imma8::kThreads, gate_up ? kernel<true> : kernel<false>);
  return fetched;
}
}
