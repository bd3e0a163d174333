// What the grouped GEMM kernels share: the work items, which strip of which weights they read, how sums are stored.
#pragma once
#include "host_device.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "words.cuh"

// Up to two parts of tokens that are multiplied with one pair's weights from one load of them.  A part belongs to
// one position of the pair, so a group serves both experts, or twice the tokens of one.
struct TokenGroup {
  int unit;         // pair, or pairs + dense expert
  int first;        // first group of this unit
  int unit_groups;  // groups of this unit
  int positions;    // bit h: position of part h
  int start[2];     // first row of part h in expert order
  int count[2];     // rows of part h, 0: nothing to do

  // Row in expert order of a part's token, -1 beyond its count.  `part` may vary between lanes.
  __device__ int sorted_row(int part, int token) const {
    return token < (part ? count[1] : count[0]) ? (part ? start[1] : start[0]) + token : -1;
  }
  // The same where part 1's tokens follow part 0's.
  __device__ int joined_row(int token) const {
    return token < count[0] ? start[0] + token : sorted_row(1, token - count[0]);
  }
};

__device__ inline TokenGroup load_group(const TokenGroup* from) {
  const int4* quads = reinterpret_cast<const int4*>(from);
  int4 low = quads[0], high = quads[1];
  return {low.x, low.y, low.z, low.w, {high.x, high.y}, {high.z, high.w}};
}

// One of the two matrix products: activations [rows in expert order, depth] times the units' [rows, depth] weights.
struct GroupedGemm {
  const uint8_t* words;             // pairs, kernel order
  const uint8_t* steps;             // of pairs, kernel order
  const uint32_t* table;            // of pair words, for codes with one
  const uint8_t* dense;             // dense experts, kernel order
  const __nv_bfloat16* activations;
  __nv_bfloat16* out;
  const int* group_counts;          // [2], of pairs and of all
  const TokenGroup* groups;         // of the layer, those of pairs first
  const int* sorted_slots;          // (token, k) slot of every row in expert order
  float4* partials;                 // by block, sums of pieces of items; null: cut none
  uint64_t* arrivals;               // [kMaxArrivals], kArrived where a warpgroup's sums are there
  int topk, pairs;
  int rows, depth;                  // of a unit's weight matrix
  int group_shift;                  // log2 of the tiles that share a step
  bool skips_pairs, skips_dense;    // whose groups other launches multiply

  __device__ int step_groups() const { return (depth / 16) >> group_shift; }
};

// Fills a code's table in shared memory with the first kThreads threads, a copy for every lane, and returns this lane's
// place in it.  The caller synchronises.
template <class Code, int kThreads>
__device__ inline uint32_t fill_table(const GroupedGemm& gemm, uint32_t table) {
  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32 * 32; first < Code::kTableEntries; first += kThreads) {
    const uint32_t entry = gemm.table[first + lane];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      store_shared_4(table + (first + i) * Code::kStride + lane * 4, __shfl_sync(~0u, entry, i));
  }
  return table + lane * 4;
}

constexpr int kStripStepBytes = 32;  // steps of a strip's 16 rows, in one group
constexpr int kMinGroupTiles = 2;

constexpr int kMaxWarpgroups = 4;  // on each multiprocessor, that leave sums
constexpr int kMaxArrivals = kMaxWarpgroups * kMaxMultiprocessors;
// Taken back by who saw it.  Nothing else writes it, so that what the memory held before is it by chance alone, once in
// 2^64: nobody clears the place before.
constexpr uint64_t kArrived = 0x8F1D3A57C2E69B04;
constexpr int kMaxRounds = 1 << 24;  // of waiting for it: seconds

// The items of a launch are its groups x row tiles.  Within a unit they run band by band: all groups of `kBand` row
// tiles, then the next band, so that a band's words and the unit's tokens stay in the L2 cache between its groups.
struct WorkItem {
  TokenGroup group;
  int row_tile;

  static constexpr int kBand = 16;

  WorkItem() = default;
  // first_group: of the launch.
  __device__ WorkItem(const TokenGroup* groups, int first_group, int item, int row_tiles) {
    const int own = first_group + item / row_tiles;
    group = load_group(groups + own);
    int rest = item - (group.first - first_group) * row_tiles;
    int band = rest / (kBand * group.unit_groups);
    rest -= band * kBand * group.unit_groups;
    int tiles = min(kBand, row_tiles - band * kBand);
    int index = rest / tiles;
    row_tile = band * kBand + rest - index * tiles;
    if (group.first + index != own) group = load_group(groups + group.first + index);
  }

  __device__ bool dense(const GroupedGemm& gemm) const { return group.unit >= gemm.pairs; }
  __device__ int position(int part) const { return (group.positions >> part) & 1; }
};

// First byte of the unit's weights.
template <class Code>
__device__ inline const uint8_t* unit_weights(const GroupedGemm& gemm, int unit) {
  const int64_t bytes = int64_t(gemm.rows / 16) * (gemm.depth / 16) * Code::kTileBytes;
  if (!Code::kReadsDense || unit < gemm.pairs) return gemm.words + unit * bytes;
  return gemm.dense + (unit - gemm.pairs) * bytes;
}

// Where a tile is among its unit's: see the order in words.cuh.
template <class Code>
__device__ inline int64_t tile_offset(const GroupedGemm& gemm, int strip, int tile) {
  const int tiles = gemm.depth / 16, first_strip = strip / kBlockStrips * kBlockStrips;
  const int first_tile = tile / kBlockTiles * kBlockTiles;
  const int strips = min(kBlockStrips, gemm.rows / 16 - first_strip), width = min(kBlockTiles, tiles - first_tile);
  return (int64_t(first_strip) * tiles + first_tile * strips + (strip - first_strip) * width + tile - first_tile) *
         Code::kTileBytes;
}

// First byte of the steps of a pair's strip, in the group that holds a tile of the depth.
__device__ inline const uint8_t* strip_steps(const GroupedGemm& gemm, int pair, int tile, int strip) {
  const int64_t group = int64_t(pair) * gemm.step_groups() + (tile >> gemm.group_shift);
  return gemm.steps + (group * (gemm.rows / 16) + strip) * kStripStepBytes;
}

// The activations that a row in expert order multiplies: gate and up read the token's own row, down reads the hidden
// row that gate and up wrote in expert order.
template <bool kGateUp>
__device__ inline int64_t activation_row(const GroupedGemm& gemm, int sorted_row) {
  return kGateUp ? gemm.sorted_slots[sorted_row] / gemm.topk : sorted_row;
}

// SiLU(gate) * up of an accumulator tile, rows 0..7 gate and 8..15 up: the lane's two tokens of row lane/4.
__device__ __forceinline__ uint32_t gated(const float (&tile)[4], float scale) {
  auto silu_times = [](float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; };
  return pack_bf16(silu_times(tile[0] * scale, tile[2] * scale), silu_times(tile[1] * scale, tile[3] * scale));
}

// Stores one 16 (weight rows) x 8 (tokens) accumulator tile; all lanes of the warp call it together.
// `sorted_row` is that of the lane's token lane/4, below 0 where the tile has no such token.
template <bool kGateUp>
__device__ __forceinline__ void store_tile(const GroupedGemm& gemm, int strip, int sorted_row, const float (&tile)[4],
                                  float scale) {
  const int column = 2 * (threadIdx.x % 4);
  if constexpr (kGateUp) {
    uint32_t hidden = transpose_8x8(gated(tile, scale));
    if (sorted_row < 0) return;
    int64_t offset = int64_t(sorted_row) * (gemm.rows / 2) + strip * 8 + column;
    *reinterpret_cast<uint32_t*>(gemm.out + offset) = hidden;
  } else {
    uint32_t upper = transpose_8x8(pack_bf16(tile[0] * scale, tile[1] * scale));
    uint32_t lower = transpose_8x8(pack_bf16(tile[2] * scale, tile[3] * scale));
    if (sorted_row < 0) return;
    int64_t offset = int64_t(gemm.sorted_slots[sorted_row]) * gemm.rows + strip * 16 + column;
    *reinterpret_cast<uint32_t*>(gemm.out + offset) = upper;
    *reinterpret_cast<uint32_t*>(gemm.out + offset + 8) = lower;
  }
}
