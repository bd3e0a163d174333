// The stages on their way through shared memory: where they lie, the barriers that hand them over, and the warps that
// bring their words and tokens.
#pragma once
#include "../grouped.cuh"
#include "ptx_sm90.cuh"
#include "schedule.cuh"
#include "tiles.cuh"
#include "tokens_int8.cuh"

// The items of a launch, as schedule.cuh asks for them and as work on groups x row tiles.
template <class Tile>
struct Items {
  const GroupedGemm& gemm;
  int row_tiles, first_group;

  __device__ explicit Items(const GroupedGemm& gemm)
      : gemm(gemm),
        row_tiles((gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips),
        first_group(gemm.skips_pairs ? uniform(gemm.group_counts[0]) : 0) {}

  __device__ int items() const {
    return (uniform(gemm.group_counts[gemm.skips_dense ? 0 : 1]) - first_group) * row_tiles;
  }
  __device__ int stages() const { return (gemm.depth / 16 + Tile::kDepthTiles - 1) / Tile::kDepthTiles; }
  __device__ int blocks() const { return gridDim.x; }
  __device__ int block() const { return blockIdx.x; }
  __device__ bool has_room() const { return gemm.partials; }

  __device__ WorkItem work(const Piece& piece) const {
    return WorkItem(gemm.groups, first_group, piece.item, row_tiles);
  }
  // A piece's tiles of the depth.
  __device__ int first_tile(const Piece& piece) const { return piece.first_stage * Tile::kDepthTiles; }
  __device__ int end_tile(const Piece& piece) const {
    return min(piece.end_stage * Tile::kDepthTiles, gemm.depth / 16);
  }
  __device__ int tiles(const Piece& piece) const { return end_tile(piece) - first_tile(piece); }
};

template <class Tile>
using LaunchOf = Launch<Tile, Items<Tile>>;

// Addresses of what a block holds in shared memory: constants, from where the driver's own kilobyte ends.
struct SharedLayout {
  static constexpr int kStart = 1024, kBarrierBytes = 16, kAlignedTable = 128 * 1024;

  int slots = 0;  // stages that are held at once
  int stages = kStart, steps = 0;
  int staging = 0, barriers = 0, table = 0, end = 0;

  // Bytes of a stage and of its steps, of the results on their way out and of the table.  aligns_table: at a multiple
  // of 64 KiB, with the stages before it and all else behind it.
  constexpr SharedLayout(int limit, int stage_bytes, int step_bytes, int staging_bytes, int table_bytes,
                         bool aligns_table) {
    if (aligns_table) {
      table = kAlignedTable;
      slots = (table - stages) / stage_bytes;
      steps = table + table_bytes;
    } else {
      slots = (limit - stages - staging_bytes - table_bytes) / (stage_bytes + step_bytes + kBarrierBytes);
      steps = stages + slots * stage_bytes;
    }
    staging = steps + slots * step_bytes;
    barriers = staging + staging_bytes;
    end = barriers + slots * kBarrierBytes;
    if (!aligns_table) {
      table = end;
      end += table_bytes;
    }
  }
};

// One of the kSlots stages that are held at once, and the parity of its barriers' next phase.
template <int kSlots>
struct RingSlot {
  int index = 0, parity = 0;
  __device__ void next() {
    if (++index == kSlots) index = 0, parity ^= 1;
  }
};

template <class Code, class Tile, bool kGateUp>
struct Stages {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kTokens = 2 * Tile::kPartTokens;
  static constexpr int kTokenBytes = Tile::kIntegers ? Int8Tokens<Tile>::kBytes : kTokens * Tile::kDepth * 2;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;  // steps have a place of their own
  static constexpr int kGroups = Code::kHasSteps ? Tile::kDepthTiles / kMinGroupTiles : 0;  // of a stage, at most
  static constexpr int kGroupBytes = Tile::kStrips * kStripStepBytes, kStepBytes = kGroups * kGroupBytes;

  // A token's row of staged results: 64 outputs of a warpgroup, half as many of gate and up, and 16 bytes that spread
  // rows over the banks.
  static constexpr int kStagingPitch = (kGateUp ? 64 : 128) + 16, kStagingBytes = 32 * kStagingPitch;
  static constexpr int kTableBytes = Code::kTableEntries * Tile::kTableStride;

  static constexpr int kSharedEnd = 228 / Tile::kBlocks * 1024;
  static constexpr SharedLayout kLayout{kSharedEnd,
                                        kStageBytes,
                                        kStepBytes,
                                        Tile::kConsumers * kStagingBytes,
                                        kTableBytes,
                                        kTableBytes > 0 && Tile::kTableStride == 256};
  static constexpr int kSlots = kLayout.slots, kSharedBytes = kLayout.end - SharedLayout::kStart;
  static constexpr int kSteps = kLayout.steps, kTable = kLayout.table;
  static_assert(kSlots > Tile::kFenceLag + 1 && kLayout.stages >= SharedLayout::kStart && kLayout.end <= kSharedEnd);

  // Addresses of a slot for a stage or of a consumer.
  __device__ static uint32_t stage(int slot) { return kLayout.stages + slot * kStageBytes; }
  __device__ static uint32_t steps(int slot) { return kSteps + slot * kStepBytes; }
  __device__ static uint32_t staging(int group) { return kLayout.staging + group * kStagingBytes; }
  __device__ static uint32_t full(int slot) { return kLayout.barriers + slot * SharedLayout::kBarrierBytes; }
  __device__ static uint32_t empty(int slot) { return full(slot) + 8; }
  __device__ static uint32_t own_table() { return kept(kTable + threadIdx.x % 32 * 4); }

  static constexpr int kTokenThreads = 64, kTokenArrivals = Tile::kIntegers ? 1 : kTokenThreads;

  // By one thread, before any other uses them.
  __device__ static void init_barriers() {
    for (int s = 0; s < kSlots; ++s) {
      barrier_init(full(s), kTokenArrivals + 1);  // the gathered tokens, and the words' expected bytes
      barrier_init(empty(s), 4 * Tile::kConsumers);
    }
    barrier_init_visible();
  }

  using Slot = RingSlot<kSlots>;

  // One warp: a bulk copy for every eight strips of a stage, and one for every group of steps.  Reads nothing that gate
  // and up write, so that the first words of the down projection arrive while gate and up still run elsewhere.
  __device__ static void copy_words(const Items<Tile>& items, const LaunchOf<Tile>& launch) {
    const GroupedGemm& gemm = items.gemm;
    const int lane = threadIdx.x % 32;
    Slot slot;
    Walk walk(items, launch);
    for (Piece piece; walk.next(items, piece);) {
      const WorkItem work = items.work(piece);
      const int end = items.end_tile(piece);
      const int first_strip = work.row_tile * Tile::kStrips, strips = min(Tile::kStrips, gemm.rows / 16 - first_strip);
      const int own_strips = max(0, min(kBlockStrips, strips - lane * kBlockStrips));
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit);
      for (int tile = items.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        const int tiles = min(Tile::kDepthTiles, end - tile);
        const int groups = Code::kHasSteps ? max(tiles >> gemm.group_shift, 1) : 0;
        const uint32_t full = Stages::full(slot.index);
        barrier_wait(empty(slot.index), slot.parity ^ 1);
        if (lane == 0) barrier_arrive_expect(full, strips * (tiles * Code::kTileBytes + groups * kStripStepBytes));
        __syncwarp();  // the bytes are expected before the first of them can arrive
        if (own_strips > 0)
          bulk_copy(stage(slot.index) + kTokenBytes + lane * kBlockStrips * kStripBytes,
                    weights + tile_offset<Code>(gemm, first_strip + lane * kBlockStrips, tile),
                    own_strips * tiles * Code::kTileBytes, full);
        if (Code::kHasSteps && lane < groups)
          bulk_copy(steps(slot.index) + lane * kGroupBytes,
                    strip_steps(gemm, work.group.unit, tile + (lane << gemm.group_shift), first_strip),
                    strips * kStripStepBytes, full);
      }
    }
  }

  // Two warps: eight threads per token, 16 bytes each, swizzled as the descriptor says.  A thread's tokens are eight
  // apart, so that its place in the swizzle never changes.
  __device__ static void gather_tokens(const Items<Tile>& items, const LaunchOf<Tile>& launch) {
    const GroupedGemm& gemm = items.gemm;
    constexpr int kTokensPerThread = kTokens / 8;
    constexpr uint32_t kNone = ~0u;
    const int first = threadIdx.x / 8 % 8, column = threadIdx.x % 8;
    const uint32_t offset = first * 128 + (column ^ first) * 16;
    const int row_vectors = gemm.depth / 8;
    const uint4* activations = reinterpret_cast<const uint4*>(gemm.activations) + column;
    Slot slot, landed;  // landed: the first stage whose tokens are still on their way
    int in_flight = 0;
    Walk walk(items, launch);
    for (Piece piece; walk.next(items, piece);) {
      const WorkItem work = items.work(piece);
      const int end = items.end_tile(piece);
      uint32_t places[kTokensPerThread];  // in 16-byte vectors, so that 32 bits hold any
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int row = work.group.sorted_row(i * 8 / Tile::kPartTokens, i * 8 % Tile::kPartTokens + first);
        // Read in any case: a branch for each would make each wait for the one before.
        const uint32_t place = activation_row<kGateUp>(gemm, max(row, 0)) * row_vectors;
        places[i] = row >= 0 ? place : kNone;
      }
      if constexpr (!kGateUp) wait_for_previous_kernel();
      for (int tile = items.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        barrier_wait(empty(slot.index), slot.parity ^ 1);
        uint32_t to = stage(slot.index) + offset;
        const uint4* from = activations + tile * 2;
        asm("" : "+r"(to), "+l"(from));  // else they are computed anew for every copy
        if (tile * 2 + column < row_vectors) {
#pragma unroll
          for (int i = 0; i < kTokensPerThread; ++i)
            if (places[i] != kNone) cp_async_16(to + i * 1024, from + places[i]);
        }
        if constexpr (Tile::kFenceLag == 0) {
          barrier_arrive_after_copies(full(slot.index));
        } else {
          cp_async_commit();
          if (in_flight < Tile::kFenceLag) {
            ++in_flight;
          } else {
            cp_async_wait<Tile::kFenceLag>();
            fence_async_proxy();
            barrier_arrive(full(landed.index));
            landed.next();
          }
        }
      }
    }
    if constexpr (!kGateUp) wait_for_previous_kernel();  // those without a piece too
    if constexpr (Tile::kFenceLag > 0) {
      cp_async_wait<0>();
      fence_async_proxy();
      for (; in_flight > 0; --in_flight, landed.next()) barrier_arrive(full(landed.index));
    }
  }

  // Three warps, each every third stage: a lane turns two columns of a token into integers.  Some
  // tokens at once, so that their reads and sums wait together.
  static constexpr int kQuantisers = 3, kAtOnce = 2;
  __device__ static void quantise_tokens(const Items<Tile>& items, const LaunchOf<Tile>& launch, int own) {
    using Tokens = Int8Tokens<Tile>;
    const GroupedGemm& gemm = items.gemm;
    const int lane = threadIdx.x % 32;
    const uint32_t* activations = reinterpret_cast<const uint32_t*>(gemm.activations) + lane;
    const int row_words = gemm.depth / 2;
    const bool halves = 1 << gemm.group_shift < Tile::kDepthTiles;
    Slot slot;
    int turn = own;  // stages until the next that is this warp's
    Walk walk(items, launch);
    for (Piece piece; walk.next(items, piece);) {
      const WorkItem work = items.work(piece);
      const int count0 = uniform(work.group.count[0]), count = count0 + uniform(work.group.count[1]);
      // A lane's token, those of part 1 after those of part 0: where its row begins.
      const int row = lane < count ? work.group.joined_row(lane) : 0;
      const uint32_t place = (kGateUp ? activation_row<true>(gemm, row) : row) * row_words;
      const int end = items.end_tile(piece);
      auto read = [&](int tile, int first, uint32_t (&columns)[kAtOnce]) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint32_t own_place = __shfl_sync(~0u, place, first + i);
          columns[i] = 0;
          if (first + i < count && tile * 8 + lane < end * 8) columns[i] = __ldcg(activations + own_place + tile * 8);
        }
      };
      if constexpr (!kGateUp) wait_for_previous_kernel();
      int tile = items.first_tile(piece);
      uint32_t next[kAtOnce];  // of the first tokens
      read(tile + turn * Tile::kDepthTiles, 0, next);
      for (; tile < end; tile += Tile::kDepthTiles, slot.next(), --turn) {
        if (turn > 0) continue;
        turn = kQuantisers;
        uint32_t columns[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) columns[i] = next[i];
        read(tile + kQuantisers * Tile::kDepthTiles, 0, next);
        barrier_wait(empty(slot.index), slot.parity ^ 1);
        if (count == 1) {
          const uint32_t place[1] = {0}, one[1] = {columns[0]};
          Tokens::store(stage(slot.index), place, one, 1, halves);
        } else {
          for (int first = 0; first < count; first += kAtOnce) {
            if (first > 0) read(tile, first, columns);
            uint32_t places[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
              places[i] = first + i + (first + i < count0 ? 0 : Tile::kPartTokens - count0);
            Tokens::store(stage(slot.index), places, columns, count - first, halves);
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(full(slot.index));
      }
    }
    if constexpr (!kGateUp) wait_for_previous_kernel();  // those without a piece too
  }

  // A tile of the warp's strip in the slot's stage, which has `tiles` of each strip.
  __device__ static uint32_t tile_at(const Slot& slot, int tile, int tiles) {
    const int warp = threadIdx.x / 32;  // the strips of a copy are as far apart as `tiles` makes them, copies are not
    return stage(slot.index) + kTokenBytes + warp / kBlockStrips * kBlockStrips * kStripBytes +
           (warp % kBlockStrips * tiles + tile) * Code::kTileBytes;
  }
  // One lane's steps of that strip.
  struct Steps {
    uint32_t strip, to_second;

    __device__ explicit Steps(int group_shift)
        : strip(kept(kSteps + threadIdx.x / 32 * kStripStepBytes + threadIdx.x % 32 / 4 * 4)),
          to_second(kept((kMinGroupTiles >> group_shift) * kGroupBytes)) {}

    struct OfStage {
      uint32_t first = 0, second = 0;  // of the first two tiles and of the others
      __device__ uint32_t of(int tile) const { return tile < kMinGroupTiles ? first : second; }
    };
    // which: of the warp's strips.
    __device__ OfStage of(const Slot& slot, int which = 0) const {
      if constexpr (!Code::kHasSteps) return {};
      static_assert(Tile::kDepthTiles == 2 * kMinGroupTiles);
      const uint32_t own = strip + slot.index * kStepBytes + which * 4 * Tile::kConsumers * kStripStepBytes;
      return {load_shared_4(own), load_shared_4(own + to_second)};
    }
  };
};
