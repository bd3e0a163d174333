// The plan that a block makes of few slots, on the host, for test_few_slots.py.
#include "host_gpu.h"
#include "sm90/few_slots.cuh"

namespace {

GroupedGemm gemm;

template <int kPartTokens>
void kernel() {
  FewSlots::make<kPartTokens, 0>(gemm, FewSlots::own_expert(gemm.choices), Deal{int(threadIdx.x)});
}

}  // namespace

extern "C" {

int few_slots() { return kFewSlots; }

// group_counts: [2]; groups, sorted_slots: room for as many as there are slots.  Returns the number of the thread whose
// deal is kept, for launches of pairs alone, of dense experts alone or of both.
int plan(const Choices* choices, bool skips_pairs, bool skips_dense, int part_tokens, int* group_counts,
         TokenGroup* groups, int* sorted_slots) {
  gemm.choices = *choices, gemm.skips_pairs = skips_pairs, gemm.skips_dense = skips_dense;
  run_blocks(1, 128, part_tokens == 8 ? kernel<8> : part_tokens == 16 ? kernel<16> : kernel<64>);
  const Plan plan = FewSlots::plan();
  std::copy(plan.group_counts, plan.group_counts + 2, group_counts);
  std::copy(plan.groups, plan.groups + choices->slots, groups);
  std::copy(plan.sorted_slots, plan.sorted_slots + choices->slots, sorted_slots);
  return FewSlots::deal().cut;
}
}
