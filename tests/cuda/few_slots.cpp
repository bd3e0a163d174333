// The plan that a block makes of few slots, on the host, for test_few_slots.py.
#include "host_gpu.h"
#include "sm90/few_slots.cuh"

namespace {

Choices choices;

template <int kPartTokens>
void kernel() {
  FewSlots::make<kPartTokens, 0>(choices);
}

}  // namespace

extern "C" {

int few_slots() { return kFewSlots; }

// group_counts: [2]; groups, sorted_slots: room for as many as there are slots.
void plan(const Choices* given, int part_tokens, int* group_counts, TokenGroup* groups, int* sorted_slots) {
  choices = *given;
  run_blocks(1, 128, part_tokens == 8 ? kernel<8> : part_tokens == 16 ? kernel<16> : kernel<64>);
  const Plan plan = FewSlots::plan();
  std::copy(plan.group_counts, plan.group_counts + 2, group_counts);
  std::copy(plan.groups, plan.groups + choices.slots, groups);
  std::copy(plan.sorted_slots, plan.sorted_slots + choices.slots, sorted_slots);
}
}
