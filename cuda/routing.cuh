// From the router's choices to token groups, and from expert outputs back to tokens.
#pragma once
#include "grouped.cuh"

constexpr int kMaxExperts = 512;
constexpr int kOneBlockSlots = 4096;  // one block sorts this many faster than three launches do

// What the router chose, an expert for every (token, k) slot, and what is made of it.
struct Routing {
  const int32_t* topk_ids;    // [slots], below 0: none
  const int32_t* expert_map;  // local expert of each, or -1; null: ids are local
  int slots;                  // tokens * topk
  int topk;
  int pairs, dense;
  // Written by route():
  int* counts;        // [2 pairs + dense], also the cursors of the scatter
  int* sorted_slots;  // [slots]
  TokenGroup* groups;
  int* group_counts;  // [2], of pairs and of all

  __host__ __device__ int experts() const { return 2 * pairs + dense; }
  __host__ __device__ int units() const { return pairs + dense; }
  // Local expert of a slot, or -1.
  __device__ int local_expert(int slot) const {
    int id = topk_ids[slot];
    if (id >= 0 && expert_map) id = expert_map[id];
    return id < experts() ? id : -1;
  }
  // Whether an expert's rows are in the same order for the same input: where one block sorts them.
  bool in_fixed_order() const { return slots <= kOneBlockSlots; }
  // Upper bound on groups with parts of `part_tokens`: every unit has at most two parts that are not full.
  int64_t max_groups(int part_tokens) const { return units() * int64_t(2) + slots / (2 * part_tokens) + 1; }
};

// Sorts the slots by expert and cuts each unit's rows into groups of two parts of at most `part_tokens`.
cudaError_t route(const Routing& routing, int part_tokens, cudaStream_t stream);

// out[m] = sum over k of topk_weights[m, k] * slots[m, k], in the order of k, skipping slots without a local expert.
cudaError_t combine(const __nv_bfloat16* slots, const float* topk_weights, const Routing& routing, __nv_bfloat16* out,
                    int tokens, int hidden, cudaStream_t stream);
