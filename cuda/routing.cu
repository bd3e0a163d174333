#include "routing.cuh"

#include "block_sums.cuh"
#include "launch.cuh"

namespace {

constexpr int kPlanThreads = kMaxExperts;  // one per expert
constexpr int kChunk = 2048;               // slots that one block of the large sort counts and scatters

// A unit's rows in expert order, as they are cut into groups.
struct UnitRows {
  int unit, first;     // row
  int count0, count1;  // of position 0 and 1
  int part_tokens;

  __device__ int parts(int count) const { return (count + part_tokens - 1) / part_tokens; }
  __device__ int groups() const { return (parts(count0) + parts(count1) + 1) / 2; }
  // Its group g; first_group: its first of the layer's.
  __device__ TokenGroup group(int first_group, int g) const {
    TokenGroup group{unit, first_group, groups(), 0, {0, 0}, {0, 0}};
    for (int h = 0; h < 2; ++h) {
      const int part = 2 * g + h, position = part >= parts(count0) && count1 > 0;
      const int before = (part - (position ? parts(count0) : 0)) * part_tokens;
      group.positions |= position << h;
      group.start[h] = first + (position ? count0 : 0) + before;
      group.count[h] = max(0, min(part_tokens, (position ? count1 : count0) - before));
    }
    return group;
  }
};

// One thread per expert, each with its expert's count: returns the expert's first row in expert order, and writes the
// groups.
__device__ int plan(const Routing& routing, int part_tokens, int count) {
  const int expert = threadIdx.x;
  const bool paired = expert < 2 * routing.pairs, leads = !paired || expert % 2 == 0;
  const int partner = __shfl_down_sync(~0u, count, 1);
  UnitRows rows{paired ? expert / 2 : expert - routing.pairs, 0, count, paired ? partner : 0, part_tokens};
  const int groups = leads ? rows.groups() : 0;
  int2 total;
  const int2 before = sum_before(make_int2(count, groups), total);
  if (expert == 0) routing.group_counts[1] = total.y;
  if (expert == min(2 * routing.pairs, kPlanThreads - 1))
    routing.group_counts[0] = 2 * routing.pairs < kPlanThreads ? before.y : total.y;

  rows.first = before.x;
  for (int g = 0; g < groups; ++g) routing.groups[before.y + g] = rows.group(before.y, g);
  return before.x;
}

// A warp's slots keep their order within an expert, and warps keep theirs, so that equal inputs give equal orders.
__global__ __launch_bounds__(kPlanThreads) void route_one_block(Routing routing, int part_tokens) {
  constexpr int kWarps = kPlanThreads / 32;
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ uint16_t counts[kWarps][kMaxExperts];  // of a warp's slots, then those of the warps before it
  __shared__ int begins[kMaxExperts];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = min(kWarps, (routing.slots + 31) / 32);  // that have slots
  for (int e = lane; e < kMaxExperts; e += 32) counts[warp][e] = 0;
  __syncwarp();
  int experts[kOneBlockSlots / kPlanThreads], ranks[kOneBlockSlots / kPlanThreads];
#pragma unroll
  for (int i = 0; i < kOneBlockSlots / kPlanThreads; ++i) {
    const int slot = threadIdx.x + i * kPlanThreads;
    experts[i] = slot < routing.slots ? routing.local_expert(slot) : -1;
  }
#pragma unroll
  for (int i = 0; i < kOneBlockSlots / kPlanThreads; ++i) {
    if (i * kPlanThreads >= routing.slots) break;
    const uint32_t same = __match_any_sync(~0u, experts[i]), before = same & ((1u << lane) - 1);
    if (experts[i] >= 0) ranks[i] = counts[warp][experts[i]] + __popc(before);
    __syncwarp();
    if (experts[i] >= 0 && before == 0) counts[warp][experts[i]] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int count = 0;
  for (int w = 0; w < warps; ++w) {
    const int own = counts[w][threadIdx.x];
    counts[w][threadIdx.x] = count;
    count += own;
  }
  begins[threadIdx.x] = plan(routing, part_tokens, count);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOneBlockSlots / kPlanThreads; ++i)
    if (experts[i] >= 0)
      routing.sorted_slots[begins[experts[i]] + counts[warp][experts[i]] + ranks[i]] = threadIdx.x + i * kPlanThreads;
}

__global__ void count_slots(Routing routing) {
  let_next_kernel_start();
  __shared__ int counts[kMaxExperts];
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  int end = min(routing.slots, int(blockIdx.x + 1) * kChunk);
  for (int slot = blockIdx.x * kChunk + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = routing.local_expert(slot);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < routing.experts(); e += blockDim.x)
    if (counts[e]) atomicAdd(&routing.counts[e], counts[e]);
}

__global__ __launch_bounds__(kPlanThreads) void plan_groups(Routing routing, int part_tokens) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const bool has_expert = threadIdx.x < routing.experts();
  const int begin = plan(routing, part_tokens, has_expert ? routing.counts[threadIdx.x] : 0);
  if (has_expert) routing.counts[threadIdx.x] = begin;
}

// Each block takes a run of rows of every expert it has slots for.  Which run is left to chance: a row's place does
// not change its arithmetic.
__global__ void scatter_slots(Routing routing) {
  wait_for_previous_kernel();
  __shared__ int cursors[kMaxExperts];
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) cursors[e] = 0;
  __syncthreads();
  const int begin = blockIdx.x * kChunk, end = min(routing.slots, begin + kChunk);
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = routing.local_expert(slot);
    if (expert >= 0) atomicAdd(&cursors[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < routing.experts(); e += blockDim.x)
    if (cursors[e]) cursors[e] = atomicAdd(&routing.counts[e], cursors[e]);
  __syncthreads();
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    int expert = routing.local_expert(slot);
    if (expert >= 0) routing.sorted_slots[atomicAdd(&cursors[expert], 1)] = slot;
  }
}

// Blocks of few registers, which find room beside those of the down projection: the launch after this one begins when
// all of these have begun.
constexpr int kCombineThreads = 64;

__global__ __launch_bounds__(kCombineThreads, 16) void combine_slots(const __nv_bfloat16* slots,
                                                                     const float* topk_weights, Routing routing,
                                                                     __nv_bfloat16* out, int64_t vectors,
                                                                     int row_vectors) {
  constexpr int kAtOnce = 8;  // experts whose rows are read together
  let_next_kernel_start();
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= vectors) return;
  const int token = index / row_vectors, column = index - int64_t(token) * row_vectors;
  const int first = token * routing.topk;
  uint32_t local = 0;  // bit k: that expert is on this device; the routing is an input, no need to wait for it
#pragma unroll 8
  for (int k = 0; k < routing.topk; ++k) local |= uint32_t(routing.local_expert(first + k) >= 0) << k;
  wait_for_previous_kernel();
  const uint4* rows = reinterpret_cast<const uint4*>(slots) + int64_t(first) * row_vectors + column;
  float sum[8] = {};
  for (int from = 0; from < routing.topk; from += kAtOnce) {
    uint4 packed[kAtOnce];
    float weights[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool here = local >> (from + k) & 1;
      packed[k] = here ? rows[int64_t(from + k) * row_vectors] : make_uint4(0, 0, 0, 0);
      weights[k] = here ? topk_weights[first + from + k] : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!(local >> (from + k) & 1)) continue;
      const uint32_t words[4] = {packed[k].x, packed[k].y, packed[k].z, packed[k].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] += weights[k] * __uint_as_float(words[i] << 16);
        sum[2 * i + 1] += weights[k] * __uint_as_float(words[i] & 0xFFFF0000u);
      }
    }
  }
  reinterpret_cast<uint4*>(out)[index] = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                    pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}

}  // namespace

cudaError_t route(const Routing& routing, int part_tokens, cudaStream_t stream) {
  if (routing.slots <= kOneBlockSlots)
    return launch_early(route_one_block, 1, kPlanThreads, 0, stream, routing, part_tokens);
  const int blocks = (routing.slots + kChunk - 1) / kChunk;
  if (cudaError_t error = cudaMemsetAsync(routing.counts, 0, routing.experts() * sizeof(int), stream)) return error;
  count_slots<<<blocks, 512, 0, stream>>>(routing);
  cudaError_t error = cudaGetLastError();
  if (!error) error = launch_early(plan_groups, 1, kPlanThreads, 0, stream, routing, part_tokens);
  if (!error) error = launch_early(scatter_slots, blocks, 512, 0, stream, routing);
  return error;
}

cudaError_t combine(const __nv_bfloat16* slots, const float* topk_weights, const Routing& routing, __nv_bfloat16* out,
                    int tokens, int hidden, cudaStream_t stream) {
  const int64_t vectors = int64_t(tokens) * hidden / 8;
  const int blocks = (vectors + kCombineThreads - 1) / kCombineThreads;
  return launch_early(combine_slots, blocks, kCombineThreads, 0, stream, slots, topk_weights, routing, out,
                      vectors, hidden / 8);
}
