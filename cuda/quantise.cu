#include "quantise.cuh"

#include <cuda_fp8.h>

#include "block_sums.cuh"
#include "launch.cuh"

namespace {

constexpr int kMaxTeam = 1024, kUsualThreads = 256;
constexpr int kChunks = 4;  // of 16 columns, of a thread

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallest = 0x1p-100f;  // of a row's largest magnitude; rows below are zeros

// One block, a thread per expert.
__global__ __launch_bounds__(kMaxExperts) void plan_tiles(Routing routing, Fp8Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ int starts[kMaxExperts], counts[kMaxExperts];
  const int expert = threadIdx.x;
  starts[expert] = INT32_MAX, counts[expert] = 0;
  __syncthreads();
  for (int g = threadIdx.x; g < routing.group_counts[0]; g += blockDim.x) {
    const TokenGroup group = routing.groups[g];
    for (int h = 0; h < 2; ++h) {
      const int owner = 2 * group.unit + (group.positions >> h & 1);
      if (group.count[h] == 0) continue;
      atomicMin(&starts[owner], group.start[h]);
      atomicAdd(&counts[owner], group.count[h]);
    }
  }
  __syncthreads();
  const int count = counts[expert], tiles = (count + kFp8TileTokens - 1) / kFp8TileTokens;
  int total;
  const int before = sum_before(tiles, total);
  if (expert == 0) *plan.tile_count = total;
  const bool leads = expert % 2 == 0;
  const int partners = __shfl_xor_sync(~0u, tiles, 1);
  const int size = tiles ? ((count + tiles - 1) / tiles + 31) / 32 * 32 : 0;
  TokenGroup tile{expert / 2, leads ? before : before - partners, tiles + partners, expert % 2, {0, 0}, {0, 0}};
  for (int t = 0; t < tiles; ++t) {
    tile.start[0] = starts[expert] + t * size;
    tile.count[0] = max(0, min(size, count - t * size));
    plan.tiles[before + t] = tile;
  }
}

// Largest value of the threads that share a row, `team` of a block, a power of two.
__device__ float largest_of_team(float value, int team) {
  __shared__ float warps[kMaxTeam / 32];
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  if (team == 32) return value;
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = threadIdx.x / team * team; w < (threadIdx.x / team + 1) * team; w += 32)
    value = fmaxf(value, warps[w / 32]);
  return value;
}

// Two bf16 values times `scale`, and two others, as the bytes 0, 2 and 1, 3.
__device__ uint32_t four_e4m3(uint32_t even, uint32_t odd, float scale) {
  auto value = [&](uint32_t pair, int half) {
    return __uint_as_float(half ? pair & 0xFFFF0000u : pair << 16) * scale;
  };
  auto two = [&](int half) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(value(even, half), value(odd, half)), __NV_SATFINITE, __NV_E4M3);
  };
  return two(0) | two(1) << 16;
}

// A team of threads for each row of a tile, a few teams in a block.
template <bool kSorted>
__global__ void quantise_rows(const __nv_bfloat16* from, int depth, int team, Routing routing, Fp8Plan plan) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int teams = blockDim.x / team, blocks = kFp8TileTokens / teams;
  const int index = blockIdx.x / blocks, first = blockIdx.x % blocks * teams, row = first + threadIdx.x / team;
  if (index >= *plan.tile_count) return;
  const TokenGroup& tile = plan.tiles[index];
  if (first >= tile.count[0]) return;
  const bool has_row = row < tile.count[0];  // the others of its block wait for it
  const int sorted_row = tile.start[0] + row;
  const int place = padded_row(tile.start[0], 2 * tile.unit + tile.positions) + row;
  const int slot = kSorted ? 0 : routing.sorted_slots[has_row ? sorted_row : tile.start[0]];
  const uint4* columns =
      reinterpret_cast<const uint4*>(from + int64_t(kSorted ? sorted_row : slot / routing.topk) * depth);

  uint4 chunks[kChunks][2];
  __nv_bfloat162 largest = __floats2bfloat162_rn(0, 0);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x % team + i * team;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      chunks[i][h] = has_row && chunk < depth / 16 ? columns[2 * chunk + h] : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < 2 * kChunks; ++i) {
    const uint4& eight = chunks[i / 2][i % 2];
    for (uint32_t pair : {eight.x, eight.y, eight.z, eight.w}) largest = __hmax2(largest, __habs2(as_bf16x2(pair)));
  }
  const float most = largest_of_team(fmaxf(__low2float(largest), __high2float(largest)), team);
  if (!has_row) return;
  const float scale = most < kSmallest ? 0 : kLargestE4m3 / most;  // NaN stays what it is
  if (threadIdx.x % team == 0) {
    plan.scales[place] = most / kLargestE4m3;
    if (!kSorted) plan.slots[place] = slot;
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = threadIdx.x % team + i * team;
    if (chunk >= (depth + kFp8Depth - 1) / kFp8Depth * (kFp8Depth / 16)) break;
    const uint4 &low = chunks[i][0], &high = chunks[i][1];
    const uint4 bytes = make_uint4(four_e4m3(low.x, high.x, scale), four_e4m3(low.y, high.y, scale),
                                   four_e4m3(low.z, high.z, scale), four_e4m3(low.w, high.w, scale));
    const int64_t line = int64_t(chunk / 8) * plan.padded() + place;
    reinterpret_cast<uint4*>(plan.rows)[line * 8 + (chunk % 8 ^ place % 8)] = bytes;
  }
}

}  // namespace

cudaError_t plan_fp8(const Routing& routing, const Fp8Plan& plan, cudaStream_t stream) {
  return launch_early(plan_tiles, 1, kMaxExperts, 0, stream, routing, plan);
}

cudaError_t quantise(const __nv_bfloat16* from, int depth, bool sorted, const Routing& routing, const Fp8Plan& plan,
                     cudaStream_t stream) {
  const int chunks = (depth + kFp8Depth - 1) / kFp8Depth * (kFp8Depth / 16);
  static_assert(kFp8MaxDepth <= kMaxTeam * kChunks * 16);
  int team = 32;
  while (team * kChunks < chunks) team *= 2;
  const int threads = std::max(team, kUsualThreads);
  const int blocks = plan.max_tiles() * (kFp8TileTokens / (threads / team));
  return launch_early(sorted ? quantise_rows<true> : quantise_rows<false>, blocks, threads, 0, stream, from, depth,
                      team, routing, plan);
}
