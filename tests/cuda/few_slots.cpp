// The plan that a block makes of few slots, on the host, for test_few_slots.py.
#include "host_gpu.h"
#include "sm90/few_slots.cuh"

namespace {

// What is planned, and where to.
const Choices* choices;
int* group_counts;
TokenGroup* groups;
int *sorted_slots, deal_of;

template <int kPartTokens>
void kernel() {
  FewSlots::make<kPartTokens, 0>(*choices, FewSlots::own_expert(*choices), Deal{int(threadIdx.x)});
  warpgroup_barrier(0);
  if (threadIdx.x > 0) return;
  const Plan plan = FewSlots::plan();
  std::copy(plan.group_counts, plan.group_counts + 2, group_counts);
  std::copy(plan.groups, plan.groups + choices->slots, groups);
  std::copy(plan.sorted_slots, plan.sorted_slots + choices->slots, sorted_slots);
  deal_of = FewSlots::deal().cut;
}

}  // namespace

extern "C" {

int few_slots() { return kFewSlots; }

// counts: [2]; planned, sorted: room for as many as there are slots.  Returns the number of the thread whose deal is
// kept.
int plan(const Choices* given, int part_tokens, int* counts, TokenGroup* planned, int* sorted) {
  choices = given, group_counts = counts, groups = planned, sorted_slots = sorted;
  run_blocks(1, 128, part_tokens == 8 ? kernel<8> : part_tokens == 16 ? kernel<16> : kernel<64>);
  return deal_of;
}
}
