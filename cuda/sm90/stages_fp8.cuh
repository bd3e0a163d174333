// The stages of the e4m3 products on their way through shared memory: 256 tokens and the words of 128 rows, 128 columns
// of each.
#pragma once
#include "../quantise.cuh"
#include "stages.cuh"

struct Fp8Tile {
  static constexpr bool kCuts = false;
  static constexpr int kConsumers = 2, kBlocks = 1, kThreads = 128 * (kConsumers + 1), kStrips = 4 * kConsumers;
  static constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;
  static constexpr int kDepth = kFp8Depth, kDepthTiles = kDepth / 16;
  static constexpr int kPartTokens = kFp8TileTokens, kWidthStep = 32;
};
static_assert(Fp8Tile::kStrips == kBlockStrips && Fp8Tile::kDepthTiles == 2 * kBlockTiles);

template <class Code>
struct Fp8Stages {
  static constexpr int kTokenBytes = Fp8Tile::kPartTokens * Fp8Tile::kDepth;
  static constexpr int kBlockBytes = kBlockStrips * kBlockTiles * Code::kTileBytes;
  static constexpr int kStageBytes = kTokenBytes + 2 * kBlockBytes;
  static constexpr int kGroupBytes = Fp8Tile::kStrips * kStripStepBytes;
  static constexpr int kMaxGroups = Fp8Tile::kDepthTiles / kMinGroupTiles;
  // Beside a stage: its steps, and with an item's last one the tokens' scales and slots.
  static constexpr int kScaleBytes = Fp8Tile::kPartTokens * 4;
  static constexpr int kBesideBytes = kMaxGroups * kGroupBytes + 2 * kScaleBytes;
  // 32 tokens' results of a warpgroup, twice; 16 bytes more than 64 rows spread them over the banks.
  static constexpr int kStagingTokens = 32, kStagingPitch = 128 + 16;
  static constexpr int kStagingBytes = kStagingTokens * kStagingPitch;

  static constexpr int kStart = SharedLayout::kStart, kSharedEnd = 228 * 1024;
  static constexpr int kStagingEnd = 2 * Fp8Tile::kConsumers * kStagingBytes;
  static constexpr int kSlots =
      (kSharedEnd - kStart - kStagingEnd) / (kStageBytes + kBesideBytes + SharedLayout::kBarrierBytes);
  static constexpr int kBeside = kStart + kSlots * kStageBytes;
  static constexpr int kStaging = kBeside + kSlots * kBesideBytes;
  static constexpr int kBarriers = kStaging + kStagingEnd;
  static constexpr int kSharedBytes = kBarriers + kSlots * SharedLayout::kBarrierBytes - kStart;
  static_assert(kSlots >= 3 && kStageBytes % 1024 == 0);

  __device__ static uint32_t stage(int slot) { return kStart + slot * kStageBytes; }
  __device__ static uint32_t steps(int slot) { return kBeside + slot * kBesideBytes; }
  __device__ static uint32_t scales(int slot) { return steps(slot) + kMaxGroups * kGroupBytes; }
  __device__ static uint32_t slots(int slot) { return scales(slot) + kScaleBytes; }
  __device__ static uint32_t staging(int warpgroup, int half) {
    return kStaging + (2 * warpgroup + half) * kStagingBytes;
  }
  __device__ static uint32_t full(int slot) { return kBarriers + slot * SharedLayout::kBarrierBytes; }
  __device__ static uint32_t empty(int slot) { return full(slot) + 8; }

  // By one thread, before any other uses them.
  __device__ static void init_barriers() {
    for (int s = 0; s < kSlots; ++s) {
      barrier_init(full(s), 1);
      barrier_init(empty(s), 4 * Fp8Tile::kConsumers);
    }
    barrier_init_visible();
  }

  using Slot = RingSlot<kSlots>;

  // Where a warp's strip begins in one of a stage's two blocks of tiles; `left`: tiles of the depth from the stage on.
  __device__ static uint32_t tiles_at(const Slot& slot, int block, int left) {
    const int width = min(kBlockTiles, max(left - block * kBlockTiles, 0));
    return stage(slot.index) + kTokenBytes + block * kBlockBytes + threadIdx.x / 32 * width * Code::kTileBytes;
  }
  // Of the lane's two rows, in a group of the stage.
  __device__ static uint32_t own_steps(const Slot& slot, int group) {
    return load_shared_4(steps(slot.index) + group * kGroupBytes + threadIdx.x / 32 * kStripStepBytes +
                         threadIdx.x % 32 / 4 * 4);
  }

  // One thread brings everything.
  template <bool kGateUp>
  __device__ static void copy(const Fp8Gemm& gemm, const Items<Fp8Tile>& items, const LaunchOf<Fp8Tile>& launch) {
    const int depth_tiles = gemm.depth / 16;
    Slot slot;
    Walk walk(items, launch);
    for (Piece piece; walk.next(items, piece);) {
      const WorkItem work = items.work(piece);
      const TokenGroup& group = work.group;
      const int first_strip = work.row_tile * Fp8Tile::kStrips;
      const int strips = min(Fp8Tile::kStrips, gemm.rows / 16 - first_strip);
      const uint8_t* weights = unit_weights<Code>(gemm, group.unit);
      const int first_row = padded_row(group.start[0], 2 * group.unit + group.positions);
      const int token_rows = (group.count[0] + 7) / 8 * 8;
      for (int tile = 0; tile < depth_tiles; tile += Fp8Tile::kDepthTiles, slot.next()) {
        const int tiles = min(Fp8Tile::kDepthTiles, depth_tiles - tile), groups = max(tiles >> gemm.group_shift, 1);
        const bool last = tile + tiles == depth_tiles;
        const uint32_t full = Fp8Stages::full(slot.index);
        barrier_wait(empty(slot.index), slot.parity ^ 1);
        barrier_arrive_expect(full, token_rows * (Fp8Tile::kDepth + (last ? kGateUp ? 4 : 8 : 0)) +
                                        strips * (tiles * Code::kTileBytes + groups * kStripStepBytes));
        bulk_copy(stage(slot.index), gemm.tokens + (int64_t(tile / Fp8Tile::kDepthTiles) * gemm.padded + first_row) *
                                                       Fp8Tile::kDepth,
                  token_rows * Fp8Tile::kDepth, full);
        for (int block = 0; block * kBlockTiles < tiles; ++block)
          bulk_copy(stage(slot.index) + kTokenBytes + block * kBlockBytes,
                    weights + tile_offset<Code>(gemm, first_strip, tile + block * kBlockTiles),
                    strips * min(kBlockTiles, tiles - block * kBlockTiles) * Code::kTileBytes, full);
        for (int g = 0; g < groups; ++g)
          bulk_copy(steps(slot.index) + g * kGroupBytes,
                    strip_steps(gemm, group.unit, tile + (g << gemm.group_shift), first_strip),
                    strips * kStripStepBytes, full);
        if (last) {
          bulk_copy(scales(slot.index), gemm.scales + first_row, token_rows * 4, full);
          if (!kGateUp) bulk_copy(slots(slot.index), gemm.slots + first_row, token_rows * 4, full);
        }
      }
    }
  }
};
