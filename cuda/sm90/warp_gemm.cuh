// Grouped GEMM of few tokens, compute capability 9.0: every warp brings its own words by bulk copies, decodes them and
// multiplies them with mma.sync.
//
// An item is a token group times two strips.  The warps of a block share its depth, chunk by chunk.  Each has its next
// chunks on their way, of the next items too, so that nothing but adding up an item's sums makes warps wait for one
// another; and items are so small that they go round evenly without being cut.
#pragma once
#include "stages.cuh"

struct WarpTile {
  static constexpr int kPartTokens = 8, kStrips = 2, kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kTiles = kBlockTiles;  // of a chunk's depth: the words of both strips are one run of memory
  static constexpr int kMostSlots = 4, kTableStride = 128;
  static constexpr int kRegisters = 112;  // of a thread: leaves some to blocks of the launch that adds up
};
static_assert(kBlockStrips % WarpTile::kStrips == 0);

template <class Code, bool kGateUp>
struct WarpGemm {
  using Tile = WarpTile;

  // A slot holds a chunk: words, then steps.
  static constexpr int kGroups = Code::kHasSteps ? Tile::kTiles / kMinGroupTiles : 0;  // at most
  static constexpr int kGroupBytes = Tile::kStrips * kStripStepBytes;
  static constexpr int kWordBytes = Tile::kStrips * Tile::kTiles * Code::kTileBytes;
  static constexpr int kSlotBytes = kWordBytes + kGroups * kGroupBytes;

  // Shared memory: the table, what the warps leave of an item's sums, four of every lane, and each warp's slots with
  // their barriers.
  static constexpr int kTableBytes = Code::kTableEntries * Tile::kTableStride;
  static constexpr int kSumBytes = 2 * Tile::kStrips * (Tile::kWarps - 1) * 32 * 16;
  static constexpr int kSharedLimit = 227 * 1024;
  static constexpr int kRoom = (kSharedLimit - kTableBytes - kSumBytes) / (Tile::kWarps * (kSlotBytes + 8));
  static constexpr int kSlots = kRoom < Tile::kMostSlots ? kRoom : Tile::kMostSlots;
  static constexpr int kSums = kTableBytes, kRing = kSums + kSumBytes;
  static constexpr int kBarriers = kRing + Tile::kWarps * kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kBarriers + Tile::kWarps * kSlots * 8;
  static_assert(kSlots >= 2 && kSlotBytes % 16 == 0 && kSharedBytes <= kSharedLimit);

  // A warp's chunks in order.
  struct Cursor {
    int group, row_tile, chunk;

    __device__ Cursor(const GroupedGemm& gemm, int first_group, int warp)
        : group(first_group + blockIdx.x / row_tiles(gemm)), row_tile(blockIdx.x % row_tiles(gemm)), chunk(warp) {}

    __device__ static int row_tiles(const GroupedGemm& gemm) {
      return (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
    }
    // Whether there is such a chunk: the last ones are fewer than the warps.
    __device__ bool has_tiles(const GroupedGemm& gemm) const { return first_tile() < gemm.depth / 16; }
    __device__ int first_tile() const { return chunk * Tile::kTiles; }
    __device__ int first_strip() const { return row_tile * Tile::kStrips; }
    __device__ int tiles(const GroupedGemm& gemm) const { return min(Tile::kTiles, gemm.depth / 16 - first_tile()); }
    __device__ int strips(const GroupedGemm& gemm) const {
      return min(Tile::kStrips, gemm.rows / 16 - first_strip());
    }

    // Goes on, and returns whether to another item; all warps of a block do so at the same time.
    __device__ bool next(const GroupedGemm& gemm, int warp, int group_step, int row_step) {
      chunk += Tile::kWarps;
      if ((chunk - warp) * Tile::kTiles < gemm.depth / 16) return false;
      chunk = warp;
      group += group_step, row_tile += row_step;
      if (row_tile >= row_tiles(gemm)) row_tile -= row_tiles(gemm), ++group;
      return true;
    }
  };

  // By one lane.
  __device__ static void fetch(const GroupedGemm& gemm, const Cursor& at, int unit, uint32_t slot, uint32_t barrier) {
    const int tiles = at.tiles(gemm), strips = at.strips(gemm);
    const int groups = Code::kHasSteps ? max(tiles >> gemm.group_shift, 1) : 0;
    const int bytes = strips * tiles * Code::kTileBytes, step_bytes = strips * kStripStepBytes;
    barrier_arrive_expect(barrier, bytes + groups * step_bytes);
    bulk_copy(slot, unit_weights<Code>(gemm, unit) + tile_offset<Code>(gemm, at.first_strip(), at.first_tile()), bytes,
              barrier);
    for (int g = 0; g < groups; ++g)
      bulk_copy(slot + kWordBytes + g * kGroupBytes,
                strip_steps(gemm, unit, at.first_tile() + (g << gemm.group_shift), at.first_strip()), step_bytes,
                barrier);
  }

  using Sums = float[Tile::kStrips][2][4];

  // The token of a part whose columns a lane has in its B operands.
  struct Token {
    const uint32_t* columns = nullptr;  // the lane's first two of the depth, or null where the part has no such token

    __device__ Token(const GroupedGemm& gemm, const TokenGroup& group, int part) {
      const int lane = threadIdx.x % 32, row = group.sorted_row(part, lane / 4);
      if (row >= 0)
        columns = reinterpret_cast<const uint32_t*>(gemm.activations) +
                  activation_row<kGateUp>(gemm, row) * (gemm.depth / 2) + lane % 4;
    }
    __device__ void load(int tile, bool exists, uint32_t (&b)[2]) const {
      b[0] = columns && exists ? columns[tile * 8] : 0;
      b[1] = columns && exists ? columns[tile * 8 + 4] : 0;
    }
  };

  // Multiplies a chunk.  What is not there, of the depth or of the strips, is zeros.
  template <bool kTwo>
  __device__ __forceinline__ static void multiply(const GroupedGemm& gemm, const Cursor& at, const TokenGroup& group,
                                                  const Token (&token)[2], uint32_t slot, uint32_t barrier, int parity,
                                                  uint32_t table, Sums& sums) {
    constexpr int kParts = kTwo ? 2 : 1;
    const int lane = threadIdx.x % 32, tiles = at.tiles(gemm), strips = at.strips(gemm);
    const Code code(group.unit >= gemm.pairs, group.positions & 1, group.positions >> 1, table);
    uint32_t b[kParts][Tile::kTiles][2];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int t = 0; t < Tile::kTiles; ++t) token[p].load(at.first_tile() + t, t < tiles, b[p][t]);
    }
    barrier_wait(barrier, parity);
#pragma unroll
    for (int s = 0; s < Tile::kStrips; ++s) {
#pragma unroll
      for (int first = 0; first < Tile::kTiles; first += kMinGroupTiles) {
        float own[kParts][4] = {};
#pragma unroll
        for (int t = first; t < first + kMinGroupTiles; ++t) {
          typename Code::Words words{};
          if (t < tiles && s < strips) words = code.load(slot + (s * tiles + t) * Code::kTileBytes, lane, t % 2);
          uint32_t a[2][4];
          code.template take_apart<kTwo>(code.look_up(words), a[0], a[1]);
#pragma unroll
          for (int p = 0; p < kParts; ++p) mma_m16n8k16(own[p], a[p], b[p][t][0], b[p][t][1]);
        }
        float2 steps = {1, 1};
        if constexpr (Code::kHasSteps)
          steps = steps_at(slot, first >> gemm.group_shift, s, first < tiles && s < strips);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          sums[s][p][0] += steps.x * own[p][0], sums[s][p][1] += steps.x * own[p][1];
          sums[s][p][2] += steps.y * own[p][2], sums[s][p][3] += steps.y * own[p][3];
        }
      }
    }
  }

  // Of a lane's two rows of a strip.
  __device__ static float2 steps_at(uint32_t slot, int group, int strip, bool exist) {
    const uint32_t place = slot + kWordBytes + group * kGroupBytes + strip * kStripStepBytes;
    const uint32_t both = exist ? load_shared_4(place + threadIdx.x % 32 / 4 * 4) : 0;
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000u)};
  }

  // Adds the warps' sums of an item in their order, one warp for each strip and part, and stores them.
  __device__ static void finish(const GroupedGemm& gemm, const Cursor& at, const TokenGroup& group, int warp,
                                uint32_t places, Sums& sums) {
    const int lane = threadIdx.x % 32, parts = group.count[1] > 0 ? 2 : 1;
    auto place = [&](int strip, int part, int from) {
      return places + (((strip * 2 + part) * (Tile::kWarps - 1) + from) * 32 + lane) * 16;
    };
    __syncthreads();  // the last item's have been read
#pragma unroll
    for (int s = 0; s < Tile::kStrips; ++s) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float (&sum)[4] = sums[s][p];
        // What the warp adds up itself stays in its registers.
        if (p < parts && warp != s * 2 + p)
          store_shared_16(place(s, p, warp - (warp > s * 2 + p)),
                          make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]),
                                     __float_as_uint(sum[3])));
      }
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < Tile::kStrips; ++s) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        if (warp != s * 2 + p || p >= parts || s >= at.strips(gemm)) continue;
        float total[4] = {};
#pragma unroll
        for (int from = 0; from < Tile::kWarps; ++from) {
          if (from == warp) {
            for (int i = 0; i < 4; ++i) total[i] += sums[s][p][i];
          } else {
            const uint4 bits = load_shared_16(place(s, p, from - (from > warp)));
            total[0] += __uint_as_float(bits.x), total[1] += __uint_as_float(bits.y);
            total[2] += __uint_as_float(bits.z), total[3] += __uint_as_float(bits.w);
          }
        }
        store_tile<kGateUp>(gemm, at.first_strip() + s, group.sorted_row(p, lane / 4), total,
                            Code::scale(group.unit >= gemm.pairs));
      }
    }
  }

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t shared_at = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const uint32_t ring = shared_at + kRing + warp * kSlots * kSlotBytes;
    const uint32_t barriers = shared_at + kBarriers + warp * kSlots * 8;
    if (lane == 0) {
      for (int s = 0; s < kSlots; ++s) barrier_init(barriers + s * 8, 1);
      barrier_init_visible();
    }
    __syncwarp();
    // Groups and words are older than the kernel that writes what the down projection multiplies.
    if constexpr (kGateUp) wait_for_previous_kernel();
    let_next_kernel_start();
    const int first_group = gemm.skips_pairs ? gemm.group_counts[0] : 0;
    const int groups = gemm.group_counts[gemm.skips_dense ? 0 : 1];
    const int row_tiles = Cursor::row_tiles(gemm), group_step = gridDim.x / row_tiles, row_step = gridDim.x % row_tiles;
    Cursor here(gemm, first_group, warp), ahead = here;
    int unit = here.group < groups ? gemm.groups[here.group].unit : 0;
    RingSlot<kSlots> slot;
    int ahead_slot = 0;
    auto fetch_next = [&]() __attribute__((always_inline)) {
      if (ahead.group >= groups) return;
      if (ahead.has_tiles(gemm)) {
        if (lane == 0) fetch(gemm, ahead, unit, ring + ahead_slot * kSlotBytes, barriers + ahead_slot * 8);
        ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
      }
      if (ahead.next(gemm, warp, group_step, row_step) && ahead.group < groups) unit = gemm.groups[ahead.group].unit;
    };
    for (int i = 0; i < kSlots - 1; ++i) fetch_next();
    const uint32_t table = fill_table<Code, Tile::kThreads>(gemm, shared_at);
    __syncthreads();
    if constexpr (!kGateUp) wait_for_previous_kernel();
    while (here.group < groups) {
      const TokenGroup group = load_group(gemm.groups + here.group);
      const Token token[2] = {{gemm, group, 0}, {gemm, group, 1}};
      const Cursor item = here;
      Sums sums = {};
      do {
        __syncwarp();  // all lanes have read the slot that is filled anew
        fetch_next();
        if (!here.has_tiles(gemm)) continue;
        const uint32_t at = ring + slot.index * kSlotBytes, barrier = barriers + slot.index * 8;
        if (group.count[1] > 0) multiply<true>(gemm, here, group, token, at, barrier, slot.parity, table, sums);
        else multiply<false>(gemm, here, group, token, at, barrier, slot.parity, table, sums);
        slot.next();
      } while (!here.next(gemm, warp, group_step, row_step));
      finish(gemm, item, group, warp, shared_at + kSums, sums);
    }
  }
};

template <class Code, bool kGateUp>
__global__ __maxnreg__(WarpTile::kRegisters) void warp_gemm(const __grid_constant__ GroupedGemm gemm) {
  WarpGemm<Code, kGateUp>::run(gemm);
}
