#include "routing.cuh"

namespace {

constexpr int kPlanThreads = 1024;
constexpr int kOneBlockSlots = 4096;  // one block sorts this many faster than three launches do
constexpr int kChunk = 2048;          // slots that one block of the large sort counts and scatters

// Local expert of a slot, or -1.
__device__ int local_expert(const Routing& routing, int slot) {
  int id = routing.topk_ids[slot];
  if (id >= 0 && routing.expert_map) id = routing.expert_map[id];
  return id < routing.experts() ? id : -1;
}

// Exclusive prefix sum over the block's first `size` threads' values; every thread gets the total.
__device__ int exclusive_sum(int value, int& total) {
  __shared__ int warp_sums[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + inclusive - value;
}

// With `counts` in shared memory: replaces each by the expert's first row in expert order, and writes the groups.
__device__ void plan(const Routing& routing, int part_tokens, int* counts) {
  __shared__ int begins[kMaxExperts + 1], first_groups[kMaxExperts + 1];
  const int experts = routing.experts(), units = routing.units(), thread = threadIdx.x;
  int total;
  int begin = exclusive_sum(thread < experts ? counts[thread] : 0, total);
  if (thread <= experts) begins[thread] = begin;
  if (thread < experts) counts[thread] = begin;
  __syncthreads();

  // A unit's experts are consecutive: begins[expert], begins[expert + 1] for a pair.
  auto parts = [&](int expert) { return (begins[expert + 1] - begins[expert] + part_tokens - 1) / part_tokens; };
  auto unit_expert = [&](int unit) { return unit < routing.pairs ? 2 * unit : unit + routing.pairs; };
  int groups = 0;
  if (thread < units) {
    int expert = unit_expert(thread);
    groups = (parts(expert) + (thread < routing.pairs ? parts(expert + 1) : 0) + 1) / 2;
  }
  int first = exclusive_sum(groups, total);
  if (thread <= units) first_groups[thread] = first;
  if (thread == 0) *routing.group_count = total;
  __syncthreads();

  for (int g = thread; g < total; g += kPlanThreads) {
    int unit = 0;
    for (int step = kMaxExperts; step > 0; step /= 2)
      if (unit + step < units && first_groups[unit + step] <= g) unit += step;
    int expert = unit_expert(unit), leader_parts = parts(expert);
    TokenGroup group{unit, first_groups[unit], first_groups[unit + 1] - first_groups[unit], 0, {0, 0}, {0, 0}};
    for (int h = 0; h < 2; ++h) {
      int part = 2 * (g - group.first) + h;
      int position = part >= leader_parts && unit < routing.pairs;
      int start = begins[expert + position] + (part - (position ? leader_parts : 0)) * part_tokens;
      group.positions |= position << h;
      group.start[h] = start;
      group.count[h] = max(0, min(part_tokens, begins[expert + position + 1] - start));
    }
    routing.groups[g] = group;
  }
}

__global__ __launch_bounds__(kPlanThreads) void route_one_block(Routing routing, int part_tokens) {
  __shared__ int counts[kMaxExperts];
  for (int e = threadIdx.x; e < kMaxExperts; e += kPlanThreads) counts[e] = 0;
  __syncthreads();
  int expert[kOneBlockSlots / kPlanThreads];
#pragma unroll
  for (int i = 0; i < kOneBlockSlots / kPlanThreads; ++i) {
    int slot = threadIdx.x + i * kPlanThreads;
    expert[i] = slot < routing.slots ? local_expert(routing, slot) : -1;
    if (expert[i] >= 0) atomicAdd(&counts[expert[i]], 1);
  }
  __syncthreads();
  plan(routing, part_tokens, counts);
#pragma unroll
  for (int i = 0; i < kOneBlockSlots / kPlanThreads; ++i)
    if (expert[i] >= 0)
      routing.sorted_slots[atomicAdd(&counts[expert[i]], 1)] = threadIdx.x + i * kPlanThreads;
}

__global__ void count_slots(Routing routing) {
  __shared__ int counts[kMaxExperts];
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  int end = min(routing.slots, int(blockIdx.x + 1) * kChunk);
  for (int slot = blockIdx.x * kChunk + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = local_expert(routing, slot);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < routing.experts(); e += blockDim.x)
    if (counts[e]) atomicAdd(&routing.counts[e], counts[e]);
}

__global__ __launch_bounds__(kPlanThreads) void plan_groups(Routing routing, int part_tokens) {
  __shared__ int counts[kMaxExperts];
  if (threadIdx.x < routing.experts()) counts[threadIdx.x] = routing.counts[threadIdx.x];
  __syncthreads();
  plan(routing, part_tokens, counts);
  if (threadIdx.x < routing.experts()) routing.counts[threadIdx.x] = counts[threadIdx.x];
}

// Each block takes a run of rows of every expert it has slots for.  Which run is left to chance: a row's place does
// not change its arithmetic.
__global__ void scatter_slots(Routing routing) {
  __shared__ int cursors[kMaxExperts];
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) cursors[e] = 0;
  __syncthreads();
  const int begin = blockIdx.x * kChunk, end = min(routing.slots, begin + kChunk);
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = local_expert(routing, slot);
    if (expert >= 0) atomicAdd(&cursors[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < routing.experts(); e += blockDim.x)
    if (cursors[e]) cursors[e] = atomicAdd(&routing.counts[e], cursors[e]);
  __syncthreads();
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = local_expert(routing, slot);
    if (expert >= 0) routing.sorted_slots[atomicAdd(&cursors[expert], 1)] = slot;
  }
}

__global__ void combine_slots(const __nv_bfloat16* slots, const float* topk_weights, Routing routing,
                              __nv_bfloat16* out, int64_t vectors, int row_vectors) {
  int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= vectors) return;
  const int token = index / row_vectors, column = (index - int64_t(token) * row_vectors) * 8;
  float sum[8] = {};
  for (int k = 0; k < routing.topk; ++k) {
    int slot = token * routing.topk + k;
    if (local_expert(routing, slot) < 0) continue;
    float weight = topk_weights[slot];
    uint4 packed = *reinterpret_cast<const uint4*>(slots + int64_t(slot) * row_vectors * 8 + column);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += weight * __uint_as_float(words[i] << 16);
      sum[2 * i + 1] += weight * __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  *reinterpret_cast<uint4*>(out + index * 8) = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                          pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

}  // namespace

void route(const Routing& routing, int part_tokens, cudaStream_t stream) {
  if (routing.slots <= kOneBlockSlots) {
    route_one_block<<<1, kPlanThreads, 0, stream>>>(routing, part_tokens);
    return;
  }
  const int blocks = (routing.slots + kChunk - 1) / kChunk;
  cudaMemsetAsync(routing.counts, 0, routing.experts() * sizeof(int), stream);
  count_slots<<<blocks, 512, 0, stream>>>(routing);
  plan_groups<<<1, kPlanThreads, 0, stream>>>(routing, part_tokens);
  scatter_slots<<<blocks, 512, 0, stream>>>(routing);
}

void combine(const __nv_bfloat16* slots, const float* topk_weights, const Routing& routing, __nv_bfloat16* out,
             int tokens, int hidden, cudaStream_t stream) {
  const int64_t vectors = int64_t(tokens) * hidden / 8;
  combine_slots<<<(vectors + 127) / 128, 128, 0, stream>>>(slots, topk_weights, routing, out, vectors, hidden / 8);
}
