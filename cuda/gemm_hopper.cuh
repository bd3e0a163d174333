// Grouped GEMM of compute capability 9.0: one warp copies words, two gather tokens, two or four warpgroups decode and
// multiply; only barriers of the stages connect them.  Weights are the A operand, in registers; tokens are the B
// operand.
//
// wgmma multiplies, reading tokens from shared memory.  For the fewest tokens mma.sync does: it lets decoding run on
// where wgmma's registers would have to be waited for, and takes up to 16 tokens of a pair without taking the pair's
// words apart by position (JoinedProduct).
#pragma once
#define PM_HOPPER
#include "grouped.cuh"

// What the kernels' tiles have in common.  A tile also has
//   kWgmma: wgmma multiplies, else mma.sync;
//   kPartTokens: tokens of each of the two parts;
//   kWidthStep: the step of the widths that products come in, up to kPartTokens;
//   kCuts: items' depth may be cut between blocks;
//   kFenceLag: 0 if the threads that multiply make tokens visible to wgmma, in every stage.  Else those that gather
//     them do, so many stages after they began to, which needs stages to spare.
template <int kConsumers_, int kBlocks_, int kTableStride_>
struct HopperTile {
  static constexpr int kConsumers = kConsumers_;      // warpgroups that multiply, a strip of 16 rows in each warp
  static constexpr int kBlocks = kBlocks_;            // that share a multiprocessor
  static constexpr int kTableStride = kTableStride_;  // of a code's table
  static constexpr int kThreads = 128 * (kConsumers + 1), kStrips = 4 * kConsumers;
  // Of a thread that copies and of one that multiplies; together what the compiler gives all threads alike.
  static constexpr int kThreadRegisters = 65536 / (kBlocks * kThreads) / 8 * 8;
  static constexpr int kCopyRegisters = kThreadRegisters > 128 ? 72 : 32;
  static constexpr int kMultiplyRegisters =
      (kThreadRegisters * kThreads - kCopyRegisters * 128) / (128 * kConsumers) / 8 * 8;
  static constexpr int kDepth = 64;  // columns per stage: 128 bytes of a token, one swizzle row
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kJoinedTokens = 16;  // so many, mma.sync takes joined
};

template <class Code, class Tile, bool kGateUp>
struct HopperKernel {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kTokens = 2 * Tile::kPartTokens, kTokenBytes = kTokens * Tile::kDepth * 2;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;  // steps have a place of their own
  static constexpr int kGroups = Code::kHasSteps ? Tile::kDepthTiles / kMinGroupTiles : 0;  // of a stage, at most
  static constexpr int kGroupBytes = Tile::kStrips * kStripStepBytes, kStepBytes = kGroups * kGroupBytes;

  // A token's row of staged results: 64 outputs of a warpgroup, and 16 bytes that spread rows over the banks.
  static constexpr int kStagingPitch = (kGateUp ? 64 : 128) + 16, kStagingBytes = 32 * kStagingPitch;

  // Shared memory: the stages, their steps, the warpgroups' results on their way out, two barriers of each stage; and
  // the table, last, or where its place is a multiple of 64 KiB.  Its addresses are constants, from where the driver's
  // own kilobyte ends.
  static constexpr int kSharedStart = 1024, kSharedEnd = 228 / Tile::kBlocks * 1024;
  static constexpr int kTableBytes = Code::kTableEntries * Tile::kTableStride;
  static constexpr bool kAlignsTable = kTableBytes > 0 && Tile::kTableStride == 256;
  static constexpr int kAlignedTable = 128 * 1024;
  static constexpr int kBarrierBytes = 16, kStagingAll = Tile::kConsumers * kStagingBytes;
  static constexpr int kStages = kAlignsTable ? (kAlignedTable - kSharedStart) / kStageBytes
                                              : (kSharedEnd - kSharedStart - kStagingAll - kTableBytes) /
                                                    (kStageBytes + kStepBytes + kBarrierBytes);
  static constexpr int kSteps = kAlignsTable ? kAlignedTable + kTableBytes : kSharedStart + kStages * kStageBytes;
  static constexpr int kStaging = kSteps + kStages * kStepBytes, kBarriers = kStaging + kStagingAll;
  static constexpr int kBarriersEnd = kBarriers + kStages * kBarrierBytes;
  static constexpr int kTable = kAlignsTable ? kAlignedTable : kBarriersEnd;
  static constexpr int kSharedBytes = kBarriersEnd + (kAlignsTable ? 0 : kTableBytes) - kSharedStart;
  static_assert(kStages > Tile::kFenceLag + 1 && kSharedStart + kSharedBytes <= kSharedEnd);

  // An item, or a piece of one: some stages of its depth.
  struct Piece {
    int item, first_stage, end_stage;
  };

  // How a launch's items are spread over its blocks.  A block takes whole items in turn; before that, the stages of the
  // items that would not go round evenly are dealt out, so that all blocks end together.  Where that cuts an item does
  // not depend on which block is how fast: equal inputs give equal sums.
  //
  // Dealers are counted from the last block, so that the block with an item's start, which waits for the blocks with
  // its other pieces, waits for blocks that were started before it and deal with those pieces first.
  class Launch {
   public:
    __device__ explicit Launch(const GroupedGemm& gemm)
        : row_tiles((gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips),
          first_group(gemm.first_group ? uniform(*gemm.first_group) : 0),
          stages((gemm.depth / 16 + Tile::kDepthTiles - 1) / Tile::kDepthTiles) {
      const int blocks = gridDim.x, rest = items(gemm) % blocks;
      cut = Tile::kCuts && gemm.partials && rest ? min(items(gemm), rest + blocks) : 0;
      // Where whole items go round nearly evenly, cutting costs more than it saves.
      if ((blocks - rest) * kWorthwhile < items(gemm)) cut = 0;
      dealers = max(min(blocks, cut * stages / kMinStages), 1);
    }

    __device__ int items(const GroupedGemm& gemm) const {
      return (uniform(*gemm.end_group) - first_group) * row_tiles;
    }
    __device__ WorkItem work(const GroupedGemm& gemm, const Piece& piece) const {
      return WorkItem(gemm, first_group, piece.item, row_tiles);
    }
    __device__ static int first_tile(const Piece& piece) { return piece.first_stage * Tile::kDepthTiles; }
    __device__ static int end_tile(const GroupedGemm& gemm, const Piece& piece) {
      return min(piece.end_stage * Tile::kDepthTiles, gemm.depth / 16);
    }

    __device__ static int tiles(const GroupedGemm& gemm, const Piece& piece) {
      return end_tile(gemm, piece) - first_tile(piece);
    }

    // First of the dealt stages that a dealer gets, and the dealer that gets one of them.
    __device__ int first_dealt(int dealer) const { return min(dealer, dealers) * (cut * stages) / dealers; }
    __device__ int dealer_of(int stage) const { return ((stage + 1) * dealers - 1) / (cut * stages); }
    // The last dealer with a piece of an item that is cut.
    __device__ int last_dealer(const Piece& piece) const { return dealer_of((piece.item + 1) * stages - 1); }

    int row_tiles, first_group, stages;
    int cut;  // items that are dealt in stages, the first ones
    int dealers;

   private:
    static constexpr int kMinStages = 4;    // a dealer's share, below which it would not pay
    static constexpr int kWorthwhile = 16;  // cut when more than a sixteenth of the time would be lost
  };
  __device__ static int own_dealer() { return gridDim.x - 1 - blockIdx.x; }
  __device__ static int block_of(int dealer) { return gridDim.x - 1 - dealer; }

  // A block's pieces, in order: the rest of an item that another block begins, which that block waits for; whole items,
  // dealt or in turn; the start of an item, whose rest should be there by then.
  class Walk {
   public:
    __device__ Walk(const GroupedGemm& gemm, const Launch& launch)
        : stages_(launch.stages), turn_(launch.cut + first_item()), items_(launch.items(gemm)) {
      if constexpr (!Tile::kCuts) return;
      const int begin = launch.first_dealt(own_dealer()), end = launch.first_dealt(own_dealer() + 1);
      dealt_ = uniform((begin + stages_ - 1) / stages_);
      rest_first_ = uniform(begin % stages_), rest_end_ = uniform(min(rest_first_ + end - begin, stages_));
      dealt_end_ = uniform(end / stages_), start_ = uniform(dealt_end_ < dealt_ ? 0 : end % stages_);
    }

    __device__ bool next(Piece& piece) {
      if (rest_first_ > 0) {
        piece = {dealt_ - 1, rest_first_, rest_end_};
        rest_first_ = 0;
      } else if (dealt_ < dealt_end_) {
        piece = {dealt_++, 0, stages_};
      } else if (turn_ < items_) {
        piece = {turn_, 0, stages_};
        turn_ += gridDim.x;
      } else if (start_ > 0) {
        piece = {dealt_end_, 0, start_};
        start_ = 0;
      } else {
        return false;
      }
      return true;
    }

   private:
    // Blocks 2i and 2i + 1 tend to share a multiprocessor: not both shall have an item more than the others.
    __device__ static int first_item() {
      if (gridDim.x % Tile::kBlocks) return blockIdx.x;
      return blockIdx.x % Tile::kBlocks * (gridDim.x / Tile::kBlocks) + blockIdx.x / Tile::kBlocks;
    }

    int stages_, turn_, items_;  // turn_: the next item in turn
    int rest_first_ = 0, rest_end_ = 0, dealt_ = 0, dealt_end_ = 0, start_ = 0;
  };

  // Addresses in shared memory, of a slot for a stage or of a consumer.
  __device__ static uint32_t stage(int slot) { return kSharedStart + slot * kStageBytes; }
  __device__ static uint32_t steps(int slot) { return kSteps + slot * kStepBytes; }
  __device__ static uint32_t staging(int group) { return kStaging + group * kStagingBytes; }
  __device__ static uint32_t full(int slot) { return kBarriers + slot * kBarrierBytes; }
  __device__ static uint32_t empty(int slot) { return full(slot) + 8; }

  // Whether part 1's tokens follow part 0's in a stage; else they start at kPartTokens.
  __device__ static bool joined(const TokenGroup& group) {
    return !Tile::kWgmma && group.count[0] + group.count[1] <= Tile::kJoinedTokens;
  }

  static constexpr int kTokenThreads = 64;

  struct Slot {
    int index = 0, parity = 0;
    __device__ void next() {
      if (++index == kStages) index = 0, parity ^= 1;
    }
  };

  // One warp: a bulk copy for every eight strips of a stage, and one for every group of steps.  Reads nothing that the
  // kernel before writes, so that the first words of the down projection arrive while gate and up still run elsewhere.
  __device__ static void copy_words(const GroupedGemm& gemm, const Launch& launch) {
    const int lane = threadIdx.x % 32;
    Slot slot;
    Walk walk(gemm, launch);
    for (Piece piece; walk.next(piece);) {
      const WorkItem work = launch.work(gemm, piece);
      const int end = launch.end_tile(gemm, piece);
      const int first_strip = work.row_tile * Tile::kStrips, strips = min(Tile::kStrips, gemm.rows / 16 - first_strip);
      const int own_strips = max(0, min(kBlockStrips, strips - lane * kBlockStrips));
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit);
      for (int tile = launch.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        const int tiles = min(Tile::kDepthTiles, end - tile);
        const int groups = Code::kHasSteps ? max(tiles >> gemm.group_shift, 1) : 0;
        const uint32_t full = HopperKernel::full(slot.index);
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
  __device__ static void gather_tokens(const GroupedGemm& gemm, const Launch& launch) {
    constexpr int kTokensPerThread = kTokens / 8;
    constexpr uint32_t kNone = ~0u;
    const int first = threadIdx.x / 8 % 8, column = threadIdx.x % 8;
    const uint32_t offset = first * 128 + (column ^ first) * 16;
    const int row_vectors = gemm.depth / 8;
    const uint4* activations = reinterpret_cast<const uint4*>(gemm.activations) + column;
    if constexpr (!kGateUp) wait_for_previous_kernel();
    Slot slot, landed;  // the stage being begun, and the first whose tokens are still on their way
    int in_flight = 0;
    Walk walk(gemm, launch);
    for (Piece piece; walk.next(piece);) {
      const WorkItem work = launch.work(gemm, piece);
      const int end = launch.end_tile(gemm, piece);
      uint32_t places[kTokensPerThread];  // in 16-byte vectors, so that 32 bits hold any
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int row = joined(work.group)
                            ? work.group.joined_row(i * 8 + first)
                            : work.group.sorted_row(i * 8 / Tile::kPartTokens, i * 8 % Tile::kPartTokens + first);
        // Read in any case: a branch for each would make each wait for the one before.
        const uint32_t place = activation_row<kGateUp>(gemm, max(row, 0)) * row_vectors;
        places[i] = row >= 0 ? place : kNone;
      }
      for (int tile = launch.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
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
    if constexpr (Tile::kFenceLag > 0) {
      cp_async_wait<0>();
      fence_async_proxy();
      for (; in_flight > 0; --in_flight, landed.next()) barrier_arrive(full(landed.index));
    }
  }

  // Sums of an item's tiles of eight tokens: kPartTiles of part 0, then those of part 1; joined tokens start at tile 0.
  static constexpr int kPartTiles = Tile::kPartTokens / 8;
  using Sums = float[2 * kPartTiles][4];

  // Multiplies a piece: kTiles0 tiles of part 0 and kTiles1 of part 1.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void multiply(const GroupedGemm& gemm, const WorkItem& work, int depth_tiles,
                                                  Slot& slot, Sums& sums) {
    const Code code(work.dense(gemm), work.position(0), work.position(1), own_table());
    float own[kTiles0 + kTiles1][4] = {};
    if constexpr (Tile::kWgmma) multiply_wgmma<kTiles0, kTiles1>(depth_tiles, gemm.group_shift, slot, code, own);
    else multiply_mma(depth_tiles, gemm.group_shift, PartProduct<kTiles0, kTiles1>(), slot, code, own);
    set_sums<kTiles0>(own, sums);
  }

  // The same of both parts' tokens, joined, in kTiles tiles.
  template <int kTiles>
  __device__ __forceinline__ static void multiply_joined(const GroupedGemm& gemm, const WorkItem& work,
                                                         int depth_tiles, Slot& slot, Sums& sums) {
    const Code code(work.dense(gemm), 0, 1, own_table());
    float own[kTiles][4] = {};
    multiply_mma(depth_tiles, gemm.group_shift, JoinedProduct<kTiles>(work.group), slot, code, own);
    set_sums<kTiles>(own, sums);
  }

  // Where tile j of products of which kTiles0 are part 0's is among the sums, and in the stage.
  template <int kTiles0>
  __device__ static constexpr int place(int j) {
    return j < kTiles0 ? j : kPartTiles + j - kTiles0;
  }
  template <int kTiles0, int kTiles>
  __device__ static void set_sums(const float (&own)[kTiles][4], Sums& sums) {
#pragma unroll
    for (int j = 0; j < 2 * kPartTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[place<kTiles0>(j)][i] = own[j][i];
  }

  __device__ static uint32_t own_table() { return kept(kTable + threadIdx.x % 32 * 4); }

  // Stores the sums of an item.
  __device__ __forceinline__ static void store(const GroupedGemm& gemm, const WorkItem& work, const Sums& sums) {
    const TokenGroup& group = work.group;
    const float scale = Code::scale(work.dense(gemm));
    const int first_strip = work.row_tile * Tile::kStrips;
    if (uniform(joined(group))) {
      if constexpr (!Tile::kWgmma)
        store_tiles<0, Tile::kJoinedTokens / 8>(gemm, first_strip, scale, sums,
                                                uniform(group.count[0] + group.count[1]),
                                                [&](int token) { return group.joined_row(token); });
      return;
    }
    store_tiles<0, kPartTiles>(gemm, first_strip, scale, sums, uniform(group.count[0]),
                               [&](int token) { return group.sorted_row(0, token); });
    store_tiles<kPartTiles, kPartTiles>(gemm, first_strip, scale, sums, uniform(group.count[1]),
                                        [&](int token) { return group.sorted_row(1, token); });
  }

  // Stores a warpgroup's sums, kTiles tiles from the kFirst on, 32 tokens of one strip of each warp at a time, through
  // shared memory: there its four warps' rows meet and leave as whole lines of a token.  sorted_row(token) gives the
  // row in expert order, below 0 beyond the last.
  template <int kFirst, int kTiles, class SortedRow>
  __device__ __forceinline__ static void store_tiles(const GroupedGemm& gemm, int first_strip, float scale,
                                                     const Sums& sums, int count, SortedRow sorted_row) {
    constexpr int kStripBytesOut = kGateUp ? 16 : 32;  // of a token, from one strip
    constexpr int kVectors = 4 * kStripBytesOut / 16, kTokensPerPass = 128 / kVectors;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const uint32_t staging = HopperKernel::staging(group);
    const int width = kGateUp ? gemm.rows / 2 : gemm.rows;
    const int vector = threadIdx.x % kVectors, token = threadIdx.x % 128 / kVectors;

#pragma unroll
    for (int first = 0; first < kTiles; first += 4) {
      if (first * 8 >= count) break;
      const int own_strips = first_strip + group * 4;
      const int strip = own_strips + vector * 16 / kStripBytesOut;
      __nv_bfloat16* out = gemm.out + own_strips * (kStripBytesOut / 2) + vector * 8;
      auto tile = [&](int t, int lower) {  // a lane's share of an 8 x 8 matrix; nothing beyond the last tile
        if (first + t >= kTiles) return 0u;
        const float(&sum)[4] = sums[kFirst + (first + t < kTiles ? first + t : 0)];
        return kGateUp ? gated(sum, scale) : pack_bf16(sum[2 * lower] * scale, sum[2 * lower + 1] * scale);
      };
      const uint32_t row = staging + lane % 8 * kStagingPitch + warp * kStripBytesOut;
      if constexpr (kGateUp) {
        const uint32_t matrices[4] = {tile(0, 0), tile(1, 0), tile(2, 0), tile(3, 0)};
        store_transposed_x4(row + lane / 8 * 8 * kStagingPitch, matrices);
      } else {
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          const uint32_t matrices[4] = {tile(t, 0), tile(t, 1), tile(t + 1, 0), tile(t + 1, 1)};
          store_transposed_x4(row + (t + lane / 16) * 8 * kStagingPitch + lane / 8 % 2 * 16, matrices);
        }
      }
      warpgroup_barrier(1 + group);
#pragma unroll
      for (int at = token; at < 32; at += kTokensPerPass) {
        const int row = sorted_row(first * 8 + at);
        if (row < 0 || strip >= gemm.rows / 16) continue;
        const int64_t place = kGateUp ? row : gemm.sorted_slots[row];
        *reinterpret_cast<uint4*>(out + place * width) = load_shared_16(staging + at * kStagingPitch + vector * 16);
      }
      warpgroup_barrier(1 + group);
    }
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
    __device__ OfStage of(const Slot& slot) const {
      if constexpr (!Code::kHasSteps) return {};
      static_assert(Tile::kDepthTiles == 2 * kMinGroupTiles);
      const uint32_t own = strip + slot.index * kStepBytes;
      return {load_shared_4(own), load_shared_4(own + to_second)};
    }
  };

  // What multiplies a strip's tile by the tokens of a stage with mma.sync.  take() gets them for 16 columns of the
  // depth, multiply() adds their products.
  //
  // Tiles of part 0 by the weights of its position, then tiles of part 1 by those of its.
  template <int kTiles0, int kTiles1>
  struct PartProduct {
    static constexpr int kTiles = kTiles0 + kTiles1;
    struct Tokens {
      uint32_t values[(kTiles + 1) / 2][4];
    };

    __device__ static int row_tile(int tile) { return place<kTiles0>(tile); }

    __device__ void take(Tokens& tokens, int load, const uint32_t (&two_tiles)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) tokens.values[load][i] = two_tiles[i];
    }

    __device__ void multiply(const Code& code, const typename Code::Entries& entries, const Tokens& tokens,
                             float (&into)[kTiles][4]) const {
      uint32_t a0[4], a1[4];
      code.template take_apart<(kTiles1 > 0)>(entries, a0, a1);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        mma_m16n8k16(into[j], j < kTiles0 ? a0 : a1, tokens.values[j / 2][j % 2 * 2],
                     tokens.values[j / 2][j % 2 * 2 + 1]);
    }
  };

  // A pair word's two weights go into the product side by side, as two columns of the depth; a token has its value in
  // the one of its expert and zero in the other.  So words need not be taken apart by position, and tokens of both
  // experts share a tile; but every token costs instructions.
  template <int kTiles_>
  struct JoinedProduct {
    static constexpr int kTiles = kTiles_;
    struct Tokens {
      uint32_t values[kTiles][4];
    };
    // Byte selectors that put the lower or the upper of two values where the token's expert has its weights.
    uint32_t lower[kTiles], upper[kTiles];

    __device__ explicit JoinedProduct(const TokenGroup& group) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const bool second = group.joined_position(j * 8 + threadIdx.x % 32 / 4);
        lower[j] = second ? 0x1044 : 0x4410, upper[j] = second ? 0x3244 : 0x4432;
      }
    }

    __device__ static int row_tile(int tile) { return tile; }

    __device__ void take(Tokens& tokens, int load, const uint32_t (&two_tiles)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = 2 * load + i / 2;
        if (tile >= kTiles) break;
        tokens.values[tile][i % 2 * 2] = __byte_perm(two_tiles[i], 0, lower[tile]);
        tokens.values[tile][i % 2 * 2 + 1] = __byte_perm(two_tiles[i], 0, upper[tile]);
      }
    }

    __device__ void multiply(const Code& code, const typename Code::Entries& entries, const Tokens& tokens,
                             float (&into)[kTiles][4]) const {
      uint32_t pairs[8];
      take_pairs(code, entries, pairs);
      uint32_t a[2][4] = {{pairs[0], pairs[2], pairs[1], pairs[3]}, {pairs[4], pairs[6], pairs[5], pairs[7]}};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma_m16n8k16(into[j], a[0], tokens.values[j][0], tokens.values[j][1]);
        mma_m16n8k16(into[j], a[1], tokens.values[j][2], tokens.values[j][3]);
      }
    }
  };

  // The stages of an item or piece for one warp, by mma.sync.
  template <class Product, int kTiles = Product::kTiles>
  __device__ __forceinline__ static void multiply_mma(int depth_tiles, int group_shift, const Product product,
                                                      Slot& slot, const Code& code, float (&sums)[kTiles][4]) {
    constexpr int kLoads = (kTiles + 1) / 2;
    // Steps multiply the products of a group: so few tokens take fewer multiplications than the weights would.
    constexpr bool kKeepsProducts = Code::kHasSteps;
    const int lane = kept(threadIdx.x % 32);
    // A load brings 16 columns of the depth for two tiles of tokens; lanes 16 and up give the addresses of the second.
    uint32_t rows[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      rows[i] = (Product::row_tile(min(2 * i + lane / 16, kTiles - 1)) * 8 + lane % 8) * 128;
    const uint32_t swizzled = (lane / 8 % 2 ^ lane % 8) * 16;
    float products[kTiles][4] = {};  // of a group, if they are kept
    auto multiply_tile = [&](int t, uint32_t tile) __attribute__((always_inline)) {
      typename Product::Tokens tokens;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t two_tiles[4];
        ldmatrix_x4(two_tiles, stage(slot.index) + (rows[i] + (swizzled ^ t * 32)));
        product.take(tokens, i, two_tiles);
      }
      const auto entries = code.look_up(code.load(tile, lane));
      product.multiply(code, entries, tokens, kKeepsProducts ? products : sums);
    };
    auto add_products = [&](uint32_t steps) __attribute__((always_inline)) {
      if constexpr (!kKeepsProducts) return;
      const float upper = __uint_as_float(steps << 16), lower = __uint_as_float(steps & 0xFFFF0000u);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float(&sum)[4] = sums[j], (&product)[4] = products[j];
        sum[0] += upper * product[0], sum[1] += upper * product[1];
        sum[2] += lower * product[2], sum[3] += lower * product[3];
        product[0] = product[1] = product[2] = product[3] = 0;
      }
    };
    const Steps own_steps(group_shift);
    const uint32_t own_tiles = kept(tile_at(Slot(), 0, Tile::kDepthTiles));  // of whole stages, in slot 0
    const bool stage_has_one_step = !Code::kHasSteps || 1 << group_shift >= Tile::kDepthTiles;
    for (int left = depth_tiles; left > 0; left -= Tile::kDepthTiles, slot.next()) {
      barrier_wait(full(slot.index), slot.parity);
      const auto steps = own_steps.of(slot);
      if (left >= Tile::kDepthTiles && stage_has_one_step) {
#pragma unroll
        for (int t = 0; t < Tile::kDepthTiles; ++t)
          multiply_tile(t, own_tiles + slot.index * kStageBytes + t * Code::kTileBytes);
        add_products(steps.first);
      } else {
#pragma unroll 1
        for (int t = 0; t < min(left, Tile::kDepthTiles); ++t) {
          multiply_tile(t, tile_at(slot, t, min(left, Tile::kDepthTiles)));
          add_products(steps.of(t));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty(slot.index));
    }
  }

  // The same by wgmma.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void multiply_wgmma(int depth_tiles, int group_shift, Slot& slot, const Code& code,
                                                        float (&sums)[kTiles0 + kTiles1][4]) {
    float(&sums0)[kTiles0][4] = reinterpret_cast<float(&)[kTiles0][4]>(sums[0]);
    float(&sums1)[kTiles1 + (kTiles1 == 0)][4] =
        reinterpret_cast<float(&)[kTiles1 + (kTiles1 == 0)][4]>(sums[kTiles1 ? kTiles0 : 0]);
    using Words = typename Code::Words;
    const int lane = kept(threadIdx.x % 32);
    auto multiply_tile = [&](const Words& words, uint32_t steps, int tile) __attribute__((always_inline)) {
      uint32_t a0[4], a1[4];
      code.template take_apart<(kTiles1 > 0)>(code.look_up(words), a0, a1);
      if constexpr (Code::kHasSteps) {
        multiply_by_steps(a0, steps);
        if constexpr (kTiles1 > 0) multiply_by_steps(a1, steps);
      }
      const uint32_t tokens = (stage(0) + tile * 32) / 16 + slot.index * (kStageBytes / 16);  // in 16 bytes
      wgmma_fence();
      wgmma_m64k16<8 * kTiles0>(sums0, a0, wgmma_descriptor(tokens));
      if constexpr (kTiles1 > 0)
        wgmma_m64k16<8 * kTiles1>(sums1, a1, wgmma_descriptor(tokens + Tile::kPartTokens * 8));
      wgmma_commit();
    };
    const Steps own_steps(group_shift);
    const uint32_t own_tiles = kept(tile_at(Slot(), 0, Tile::kDepthTiles));  // of whole stages, in slot 0
    int finished = -1;  // slot whose products are still in flight
    auto release = [&] {
      if (lane == 0 && finished >= 0) barrier_arrive(empty(finished));
    };

    // One tile is always being multiplied while the next is decoded, also from one stage to the next.
    for (int whole = depth_tiles / Tile::kDepthTiles; whole > 0; --whole) {
      barrier_wait(full(slot.index), slot.parity);
      if constexpr (Tile::kFenceLag == 0) fence_async_proxy();
      const auto steps = own_steps.of(slot);
      const uint32_t tiles = own_tiles + slot.index * kStageBytes;
      Words words = code.load(tiles, lane);
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) {
        const Words now = words;
        if (t + 1 < Tile::kDepthTiles) words = code.load(tiles + (t + 1) * Code::kTileBytes, lane);
        multiply_tile(now, steps.of(t), t);
        wgmma_wait<1>();
        if (t == 0) release();
      }
      finished = slot.index;
      slot.next();
    }
    wgmma_wait<0>();
    release();
    if (const int rest = depth_tiles % Tile::kDepthTiles) {
      barrier_wait(full(slot.index), slot.parity);
      if constexpr (Tile::kFenceLag == 0) fence_async_proxy();
      const auto steps = own_steps.of(slot);
#pragma unroll 1
      for (int t = 0; t < rest; ++t) {
        multiply_tile(code.load(tile_at(slot, t, rest), lane), steps.of(t), t);
        wgmma_wait<0>();
      }
      finished = slot.index;
      release();
      slot.next();
    }
  }

  // Where the sums of the piece that a dealer leaves are, this lane's of one token tile; and whether they are there.
  __device__ static float4* left_sums(const GroupedGemm& gemm, int dealer, int tile) {
    const int warp = block_of(dealer) * Tile::kStrips + threadIdx.x / 32;
    return gemm.partials + (warp * (kTokens / 8) + tile) * 32 + threadIdx.x % 32;
  }
  __device__ static int* left_flag(const GroupedGemm& gemm, int dealer) {
    return gemm.arrivals + block_of(dealer) * Tile::kConsumers + threadIdx.x / 128;
  }

  // Whether a tile of the sums has tokens.
  __device__ static bool used(const TokenGroup& group, int tile) {
    if (joined(group)) return tile * 8 < group.count[0] + group.count[1];
    return tile % kPartTiles * 8 < group.count[tile / kPartTiles];
  }

  // Leaves the sums of a piece that is not an item's start; a block has one at most, its first.
  __device__ static void leave_sums(const GroupedGemm& gemm, const TokenGroup& group, const Sums& sums) {
#pragma unroll
    for (int j = 0; j < 2 * kPartTiles; ++j)
      if (uniform(used(group, j)))
        __stcg(left_sums(gemm, own_dealer(), j), make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
    warpgroup_barrier(1 + threadIdx.x / 128);
    store_release_if(threadIdx.x % 128 == 0, left_flag(gemm, own_dealer()), 1);
  }

  // Adds the sums that the next dealers up to the last have left, in their order.
  __device__ static void add_sums(const GroupedGemm& gemm, const TokenGroup& group, int last_dealer, Sums& sums) {
    for (int dealer = own_dealer() + 1; dealer <= last_dealer; ++dealer) {
      if (threadIdx.x % 128 == 0) {
        while (!load_acquire(left_flag(gemm, dealer))) {
        }
        *left_flag(gemm, dealer) = 0;  // for the next launch
      }
      warpgroup_barrier(1 + threadIdx.x / 128);
#pragma unroll
      for (int j = 0; j < 2 * kPartTiles; ++j) {
        if (!used(group, j)) continue;
        const float4 other = __ldcg(left_sums(gemm, dealer, j));
        sums[j][0] += other.x, sums[j][1] += other.y, sums[j][2] += other.z, sums[j][3] += other.w;
      }
    }
  }

  // Calls multiply with the narrowest products that hold the parts' tokens.  Their widths have to be known at compile
  // time, and deciding outside the loop over the stages leaves nothing in it that the compiler takes for divergence.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void multiply_parts(const GroupedGemm& gemm, const WorkItem& work, int count0,
                                                        int count1, int depth_tiles, Slot& slot, Sums& sums) {
    constexpr int kStep = Tile::kWidthStep / 8;
    if constexpr (kTiles1 == 0 && kTiles0 < kPartTiles)
      if (count0 > 8 * kTiles0)
        return multiply_parts<kTiles0 + kStep, 0>(gemm, work, count0, count1, depth_tiles, slot, sums);
    if constexpr (kTiles1 < kPartTiles)
      if (count1 > 8 * kTiles1)
        return multiply_parts<kTiles0, kTiles1 + kStep>(gemm, work, count0, count1, depth_tiles, slot, sums);
    multiply<kTiles0, kTiles1>(gemm, work, depth_tiles, slot, sums);
  }

  __device__ __forceinline__ static void multiply_piece(const GroupedGemm& gemm, const Launch& launch,
                                                        const Piece& piece, const WorkItem& work, Slot& slot,
                                                        Sums& sums) {
    const int count0 = uniform(work.group.count[0]), count1 = uniform(work.group.count[1]);
    const int tiles = launch.tiles(gemm, piece);
    if constexpr (!Tile::kWgmma) {
      if (uniform(joined(work.group))) {
        if (count0 + count1 <= 8) multiply_joined<1>(gemm, work, tiles, slot, sums);
        else multiply_joined<Tile::kJoinedTokens / 8>(gemm, work, tiles, slot, sums);
        return;
      }
    }
    multiply_parts<Tile::kWidthStep / 8, 0>(gemm, work, count0, count1, tiles, slot, sums);
  }

  // The start of an item, which comes last, is completed outside the loop: a loop in it, over the pieces that other
  // blocks left, would make the compiler take the whole loop for divergent, and compute addresses lane by lane.
  __device__ __forceinline__ static void consume_all(const GroupedGemm& gemm, const Launch& launch) {
    Slot slot;
    Sums sums;
    Walk walk(gemm, launch);
    Piece piece;
    bool starts = false;
    while (!starts && walk.next(piece)) {
      const WorkItem work = launch.work(gemm, piece);
      multiply_piece(gemm, launch, piece, work, slot, sums);
      starts = Tile::kCuts && piece.first_stage == 0 && piece.end_stage < launch.stages;
      if (Tile::kCuts && piece.first_stage > 0) leave_sums(gemm, work.group, sums);
      else if (!starts) store(gemm, work, sums);
    }
    if (!starts) return;
    const WorkItem work = launch.work(gemm, piece);
    add_sums(gemm, work.group, launch.last_dealer(piece), sums);
    store(gemm, work, sums);
  }

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(1024) uint8_t shared[];
    if (shared_address(shared) != kSharedStart) __trap();
    fill_table<Code>(gemm, kTable);
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full(s), kTokenThreads + 1);  // the gathered tokens, and the words' expected bytes
        barrier_init(empty(s), 4 * Tile::kConsumers);
      }
      barrier_init_visible();
    }
    __syncthreads();

    // The groups come from a kernel that had ended before gate and up let the down projection start.
    if constexpr (kGateUp) wait_for_previous_kernel();
    let_next_kernel_start();
    const Launch launch(gemm);
    if (uniform(threadIdx.x / 128) == Tile::kConsumers) {
      registers_down<Tile::kCopyRegisters>();
      const int warp = uniform(threadIdx.x % 128 / 32);
      if (warp < 2) gather_tokens(gemm, launch);
      else if (warp == 2) copy_words(gemm, launch);
    } else {
      registers_up<Tile::kMultiplyRegisters>();
      consume_all(gemm, launch);
    }
  }
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void gemm_hopper(const __grid_constant__ GroupedGemm gemm) {
  HopperKernel<Code, Tile, kGateUp>::run(gemm);
}
