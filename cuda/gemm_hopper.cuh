// Grouped GEMM of compute capability 9.0: one warp copies words, two gather tokens, two warpgroups decode and multiply;
// only barriers of the stages connect them.  Weights are the A operand, in registers; tokens are the B operand.
//
// With many tokens wgmma multiplies, reading tokens from shared memory.  With few, decoding is what takes time, and
// mma.sync lets it run on where wgmma's registers would have to be waited for; up to 16 tokens of a pair are multiplied
// without taking its words apart by position (JoinedProduct).
#pragma once
#define PM_HOPPER
#include <type_traits>

#include "grouped.cuh"

template <bool kWgmma_, int kPartTokens_, int kWidthStep_, int kWarpStrips_, bool kCuts_, int kBlocks_>
struct HopperTile {
  static constexpr bool kWgmma = kWgmma_;           // else mma.sync
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kWidthStep = kWidthStep_;    // widths that products come in, up to kPartTokens
  static constexpr int kWarpStrips = kWarpStrips_;  // of 16 rows that a warp multiplies; two are slower so far
  static constexpr bool kCuts = kCuts_;             // may cut an item's depth between blocks
  static constexpr int kBlocks = kBlocks_;          // that share a multiprocessor, 1 or 2
  // Of a thread that copies and of one that multiplies; together what the compiler gives all threads alike.
  static constexpr int kCopyRegisters = kBlocks == 1 ? 72 : 32, kMultiplyRegisters = kBlocks == 1 ? 216 : 104;
  static constexpr int kConsumers = 2;  // warpgroups that multiply
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kWarps = 4 * kConsumers, kStrips = kWarps * kWarpStrips;
  static constexpr int kTokens = 2 * kPartTokens;
  static constexpr int kDepth = 64;  // columns per stage: 128 bytes of a token, one swizzle row
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
  static constexpr int kJoinedTokens = 16;  // so many, mma.sync takes joined
  static constexpr int kPieceFloats = kCuts ? 16 * kStrips * kTokens : 0;  // of a piece's sums
  static_assert(kWarpStrips == 1 || !kWgmma);
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class Code, class Tile, bool kGateUp>
struct HopperKernel {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kStageBytes = Tile::kTokenBytes + kWeightBytes;  // steps have a place of their own
  static constexpr int kGroups = Code::kHasSteps ? Tile::kDepthTiles / kMinGroupTiles : 0;  // of a stage, at most
  static constexpr int kGroupBytes = Tile::kStrips * kStripStepBytes, kStepBytes = kGroups * kGroupBytes;

  // A token's row of staged results: 64 outputs of a warpgroup, and 16 bytes that spread rows over the banks.
  static constexpr int kStagingPitch = (kGateUp ? 64 : 128) + 16, kStagingBytes = 32 * kStagingPitch;

  // As many stages as a block's part of the shared memory holds.
  static constexpr int kTableBytes = Code::kTableEntries * 128;
  static constexpr int kBarrierBytes = 16, kSharedLimit = (228 / Tile::kBlocks - 1) * 1024;
  static constexpr int kFixedBytes = Tile::kConsumers * kStagingBytes + kTableBytes;
  static constexpr int kStages = (kSharedLimit - kFixedBytes) / (kStageBytes + kStepBytes + kBarrierBytes);
  static constexpr int kSharedBytes = kStages * (kStageBytes + kStepBytes + kBarrierBytes) + kFixedBytes;

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
    __device__ bool is_whole(const Piece& piece) const { return piece.end_stage - piece.first_stage == stages; }
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

  // A block's pieces, in order.
  class Walk {
   public:
    __device__ Walk(const GroupedGemm& gemm, const Launch& launch)
        : stage_(launch.first_dealt(own_dealer())),
          end_(launch.first_dealt(own_dealer() + 1)),
          item_(launch.cut + first_item()),
          items_(launch.items(gemm)) {}

    __device__ bool next(const Launch& launch, Piece& piece) {
      if (stage_ < end_) {
        const int item = stage_ / launch.stages, first = stage_ - item * launch.stages;
        piece = {item, first, min(launch.stages, first + end_ - stage_)};
        stage_ += piece.end_stage - first;
        return true;
      }
      if (item_ >= items_) return false;
      piece = {item_, 0, launch.stages};
      item_ += gridDim.x;
      return true;
    }

   private:
    // Blocks 2i and 2i + 1 tend to share a multiprocessor: not both shall have an item more than the others.
    __device__ static int first_item() {
      if (gridDim.x % Tile::kBlocks) return blockIdx.x;
      return blockIdx.x % Tile::kBlocks * (gridDim.x / Tile::kBlocks) + blockIdx.x / Tile::kBlocks;
    }

    int stage_, end_, item_, items_;
  };

  // Shared memory: the stages, their steps, the warpgroups' results on their way out, two barriers of each stage, and
  // the table.
  struct Pipeline {
    uint8_t* stages;

    __device__ uint32_t stage(int slot) const { return shared_address(stages) + slot * kStageBytes; }
    __device__ uint8_t* steps(int slot) const { return stages + kStages * kStageBytes + slot * kStepBytes; }
    __device__ uint8_t* staging(int group) const { return steps(kStages) + group * kStagingBytes; }
    __device__ uint32_t full(int slot) const {
      return shared_address(staging(Tile::kConsumers)) + slot * kBarrierBytes;
    }
    __device__ uint32_t empty(int slot) const { return full(slot) + 8; }
    __device__ uint8_t* table() const { return staging(Tile::kConsumers) + kStages * kBarrierBytes; }
  };

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
  __device__ static void copy_words(const GroupedGemm& gemm, const Pipeline& pipeline, const Launch& launch) {
    const int lane = threadIdx.x % 32;
    Slot slot;
    Walk walk(gemm, launch);
    for (Piece piece; walk.next(launch, piece);) {
      const WorkItem work = launch.work(gemm, piece);
      const int end = launch.end_tile(gemm, piece);
      const int first_strip = work.row_tile * Tile::kStrips, strips = min(Tile::kStrips, gemm.rows / 16 - first_strip);
      const int own_strips = max(0, min(kBlockStrips, strips - lane * kBlockStrips));
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit);
      for (int tile = launch.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        const int tiles = min(Tile::kDepthTiles, end - tile);
        const int groups = Code::kHasSteps ? max(tiles >> gemm.group_shift, 1) : 0;
        const uint32_t full = pipeline.full(slot.index);
        barrier_wait(pipeline.empty(slot.index), slot.parity ^ 1);
        if (lane == 0) barrier_arrive_expect(full, strips * (tiles * Code::kTileBytes + groups * kStripStepBytes));
        __syncwarp();  // the bytes are expected before the first of them can arrive
        if (own_strips > 0)
          bulk_copy(pipeline.stage(slot.index) + Tile::kTokenBytes + lane * kBlockStrips * kStripBytes,
                    weights + tile_offset<Code>(gemm, first_strip + lane * kBlockStrips, tile),
                    own_strips * tiles * Code::kTileBytes, full);
        if (Code::kHasSteps && lane < groups)
          bulk_copy(shared_address(pipeline.steps(slot.index)) + lane * kGroupBytes,
                    strip_steps(gemm, work.group.unit, tile + (lane << gemm.group_shift), first_strip),
                    strips * kStripStepBytes, full);
      }
    }
  }

  // Two warps: eight threads per token, 16 bytes each, swizzled as the descriptor says.  A thread's tokens are eight
  // apart, so that its place in the swizzle never changes.
  __device__ static void gather_tokens(const GroupedGemm& gemm, const Pipeline& pipeline, const Launch& launch) {
    constexpr int kTokensPerThread = Tile::kTokens / 8;
    constexpr uint32_t kNone = ~0u;
    const int first = threadIdx.x / 8 % 8, column = threadIdx.x % 8;
    const uint32_t offset = first * 128 + (column ^ first) * 16;
    const int row_vectors = gemm.depth / 8;
    const uint4* activations = reinterpret_cast<const uint4*>(gemm.activations) + column;
    if constexpr (!kGateUp) wait_for_previous_kernel();
    Slot slot;
    Walk walk(gemm, launch);
    for (Piece piece; walk.next(launch, piece);) {
      const WorkItem work = launch.work(gemm, piece);
      const int end = launch.end_tile(gemm, piece);
      uint32_t places[kTokensPerThread];  // in 16-byte vectors, so that 32 bits hold any
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int row = joined(work.group)
                            ? work.group.joined_row(i * 8 + first)
                            : work.group.sorted_row(i * 8 / Tile::kPartTokens, i * 8 % Tile::kPartTokens + first);
        places[i] = row >= 0 ? activation_row<kGateUp>(gemm, row) * row_vectors : kNone;
      }
      for (int tile = launch.first_tile(piece); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        barrier_wait(pipeline.empty(slot.index), slot.parity ^ 1);
        uint32_t to = pipeline.stage(slot.index) + offset;
        const uint4* from = activations + tile * 2;
        asm("" : "+r"(to), "+l"(from));  // else they are computed anew for every copy
        if (tile * 2 + column < row_vectors) {
#pragma unroll
          for (int i = 0; i < kTokensPerThread; ++i)
            if (places[i] != kNone) cp_async_16(to + i * 1024, from + places[i]);
        }
        barrier_arrive_after_copies(pipeline.full(slot.index));
      }
    }
  }

  // Multiplies an item or a piece of one: kTiles0 tiles of eight tokens of part 0 and kTiles1 of part 1.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void consume(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                 const Launch& launch, const Piece& piece, const WorkItem& work,
                                                 Slot& slot) {
    float sums[Tile::kWarpStrips][kTiles0 + kTiles1][4] = {};  // of part 0, then of part 1
    const bool dense = work.dense(gemm);
    const Code code(dense, work.position(0), work.position(1), own_table(pipeline));
    const int tiles = launch.tiles(gemm, piece);
    if constexpr (Tile::kWgmma)
      multiply_wgmma<kTiles0, kTiles1>(tiles, gemm.group_shift, pipeline, slot, code, sums[0]);
    else
      multiply_mma(tiles, gemm.group_shift, PartProduct<kTiles0, kTiles1>(), pipeline, slot, code, sums);
    if (!complete(gemm, launch, piece, sums)) return;
    auto store_part = [&](auto first, auto tiles, int part) __attribute__((always_inline)) {
      store<first.value, tiles.value>(gemm, pipeline, work.row_tile * Tile::kStrips, Code::scale(dense), sums,
                                      uniform(work.group.count[part]),
                                      [&](int token) { return work.group.sorted_row(part, token); });
    };
    store_part(Constant<0>{}, Constant<kTiles0>{}, 0);
    if constexpr (kTiles1 > 0) store_part(Constant<kTiles0>{}, Constant<kTiles1>{}, 1);
  }

  // The same of both parts' tokens, joined, in kTiles tiles.
  template <int kTiles>
  __device__ __forceinline__ static void consume_joined(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                        const Launch& launch, const Piece& piece, const WorkItem& work,
                                                        Slot& slot) {
    float sums[Tile::kWarpStrips][kTiles][4] = {};
    const bool dense = work.dense(gemm);
    const Code code(dense, 0, 1, own_table(pipeline));
    multiply_mma(launch.tiles(gemm, piece), gemm.group_shift, JoinedProduct<kTiles>(work.group), pipeline, slot, code,
                 sums);
    if (!complete(gemm, launch, piece, sums)) return;
    store<0, kTiles>(gemm, pipeline, work.row_tile * Tile::kStrips, Code::scale(dense), sums,
                     uniform(work.group.count[0] + work.group.count[1]),
                     [&](int token) { return work.group.joined_row(token); });
  }

  // Whether the sums of a piece are an item's, with those that other blocks left of its other pieces: so they are for
  // the block with its start.
  template <int kTiles>
  __device__ __forceinline__ static bool complete(const GroupedGemm& gemm, const Launch& launch, const Piece& piece,
                                                  float (&sums)[Tile::kWarpStrips][kTiles][4]) {
    if (!Tile::kCuts || launch.is_whole(piece)) return true;
    if (piece.first_stage > 0) {
      leave_sums(gemm, sums);
      return false;
    }
    add_sums(gemm, launch.last_dealer(piece), sums);
    return true;
  }

  __device__ static uint32_t own_table(const Pipeline& pipeline) {
    return shared_address(pipeline.table()) + threadIdx.x % 32 * 4;
  }

  // Stores a warpgroup's sums, kTiles tiles from the kFirst on, 32 tokens of one strip of each warp at a time, through
  // shared memory: there its four warps' rows meet and leave as whole lines of a token.  sorted_row(token) gives the
  // row in expert order, below 0 beyond the last.
  template <int kFirst, int kTiles, int kAllTiles, class SortedRow>
  __device__ __forceinline__ static void store(const GroupedGemm& gemm, const Pipeline& pipeline, int first_strip,
                                               float scale, const float (&sums)[Tile::kWarpStrips][kAllTiles][4],
                                               int count, SortedRow sorted_row) {
    constexpr int kStripBytesOut = kGateUp ? 16 : 32;  // of a token, from one strip
    constexpr int kVectors = 4 * kStripBytesOut / 16, kTokensPerPass = 128 / kVectors;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    uint8_t* staging = pipeline.staging(group);
    const int width = kGateUp ? gemm.rows / 2 : gemm.rows;
    const int vector = threadIdx.x % kVectors, token = threadIdx.x % 128 / kVectors;

#pragma unroll
    for (int i = 0; i < Tile::kWarpStrips * ((kTiles + 3) / 4); ++i) {
      const int s = i % Tile::kWarpStrips, first = i / Tile::kWarpStrips * 4;
      if (first * 8 >= count) break;
      const int own_strips = first_strip + s * Tile::kWarps + group * 4;
      const int strip = own_strips + vector * 16 / kStripBytesOut;
      __nv_bfloat16* out = gemm.out + own_strips * (kStripBytesOut / 2) + vector * 8;
      auto tile = [&](int t, int lower) {  // a lane's share of an 8 x 8 matrix; nothing beyond the last tile
        if (first + t >= kTiles) return 0u;
        const float(&sum)[4] = sums[s][kFirst + (first + t < kTiles ? first + t : 0)];
        return kGateUp ? gated(sum, scale) : pack_bf16(sum[2 * lower] * scale, sum[2 * lower + 1] * scale);
      };
      const uint32_t row = shared_address(staging) + lane % 8 * kStagingPitch + warp * kStripBytesOut;
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
        *reinterpret_cast<uint4*>(out + place * width) =
            *reinterpret_cast<const uint4*>(staging + at * kStagingPitch + vector * 16);
      }
      warpgroup_barrier(1 + group);
    }
  }

  // A tile of the warp's strip number s in the slot's stage, which has `tiles` of each strip.
  __device__ static const uint8_t* tile_at(const Pipeline& pipeline, const Slot& slot, int s, int tile, int tiles) {
    return pipeline.stages + slot.index * kStageBytes + Tile::kTokenBytes + s * Tile::kWarps * kStripBytes +
           (threadIdx.x / 32 * tiles + tile) * Code::kTileBytes;
  }
  // One lane's steps of such a strip, of the stage's first two tiles and of its others.
  struct Steps {
    uint32_t first = 0, second = 0;
    Steps() = default;
    __device__ Steps(const Pipeline& pipeline, const Slot& slot, int s, int group_shift) {
      if constexpr (!Code::kHasSteps) return;
      static_assert(Tile::kDepthTiles == 2 * kMinGroupTiles);
      const uint8_t* strip = pipeline.steps(slot.index) + (s * Tile::kWarps + threadIdx.x / 32) * kStripStepBytes +
                             threadIdx.x % 32 / 4 * 4;
      first = *reinterpret_cast<const uint32_t*>(strip);
      second = *reinterpret_cast<const uint32_t*>(strip + (kMinGroupTiles >> group_shift) * kGroupBytes);
    }
    __device__ uint32_t of(int tile) const { return tile < kMinGroupTiles ? first : second; }
  };

  // What multiplies a strip's tile by the tokens of a stage with mma.sync.  tokens() reads them for 16 columns of the
  // depth, once for all strips of a warp; multiply() adds their products to a strip's.
  //
  // Tiles of part 0 by the weights of its position, then tiles of part 1 by those of its.
  template <int kTiles0, int kTiles1>
  struct PartProduct {
    static constexpr int kTiles = kTiles0 + kTiles1;
    struct Tokens {
      uint32_t values[(kTiles + 1) / 2][4];
    };

    __device__ static int row_tile(int tile) { return tile + (tile < kTiles0 ? 0 : Tile::kPartTokens / 8 - kTiles0); }

    __device__ void take(Tokens& tokens, int load, const uint32_t (&two_tiles)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) tokens.values[load][i] = two_tiles[i];
    }

    template <bool kScales>
    __device__ void multiply(const Code& code, const typename Code::Words& words, uint32_t steps, const Tokens& tokens,
                             float (&into)[kTiles][4]) const {
      uint32_t a0[4], a1[4];
      code.template decode<(kTiles1 > 0)>(words, a0, a1);
      if constexpr (kScales) {
        multiply_by_steps(a0, steps);
        if constexpr (kTiles1 > 0) multiply_by_steps(a1, steps);
      }
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

    template <bool kScales>
    __device__ void multiply(const Code& code, const typename Code::Words& words, uint32_t steps, const Tokens& tokens,
                             float (&into)[kTiles][4]) const {
      uint32_t pairs[8];
      decode_pairs(code, words, pairs);
      uint32_t a[2][4] = {{pairs[0], pairs[2], pairs[1], pairs[3]}, {pairs[4], pairs[6], pairs[5], pairs[7]}};
      if constexpr (kScales) {
        multiply_by_steps(a[0], steps);
        multiply_by_steps(a[1], steps);
      }
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
                                                      const Pipeline& pipeline, Slot& slot, const Code& code,
                                                      float (&sums)[Tile::kWarpStrips][kTiles][4]) {
    constexpr int kLoads = (kTiles + 1) / 2, kWarpStrips = Tile::kWarpStrips;
    // Steps multiply the products of a group, while registers can hold those beside the sums: a few tokens take fewer
    // multiplications so than the weights would.
    constexpr bool kKeepsProducts = Code::kHasSteps && kTiles * kWarpStrips <= 6;
    constexpr bool kScalesWeights = Code::kHasSteps && !kKeepsProducts;
    const int lane = threadIdx.x % 32;
    // A load brings 16 columns of the depth for two tiles of tokens; lanes 16 and up give the addresses of the second.
    uint32_t rows[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      rows[i] = (Product::row_tile(min(2 * i + lane / 16, kTiles - 1)) * 8 + lane % 8) * 128;
    const uint32_t swizzled = (lane / 8 % 2 ^ lane % 8) * 16;
    float products[kKeepsProducts ? kWarpStrips : 1][kTiles][4] = {};
    auto multiply_tile = [&](int t, int tiles, const Steps(&steps)[kWarpStrips]) __attribute__((always_inline)) {
      typename Product::Tokens tokens;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t two_tiles[4];
        ldmatrix_x4(two_tiles, pipeline.stage(slot.index) + (rows[i] + (swizzled ^ t * 32)));
        product.take(tokens, i, two_tiles);
      }
#pragma unroll
      for (int s = 0; s < kWarpStrips; ++s) {
        const auto words = code.load(tile_at(pipeline, slot, s, t, tiles), lane);
        product.template multiply<kScalesWeights>(code, words, steps[s].of(t), tokens,
                                                  kKeepsProducts ? products[s] : sums[s]);
      }
    };
    auto add_products = [&](int t, const Steps(&steps)[kWarpStrips]) __attribute__((always_inline)) {
      if constexpr (!kKeepsProducts) return;
#pragma unroll
      for (int s = 0; s < kWarpStrips; ++s) {
        const uint32_t step = steps[s].of(t);
        const float upper = __uint_as_float(step << 16), lower = __uint_as_float(step & 0xFFFF0000u);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          float(&sum)[4] = sums[s][j], (&product)[4] = products[s][j];
          sum[0] += upper * product[0], sum[1] += upper * product[1];
          sum[2] += lower * product[2], sum[3] += lower * product[3];
          product[0] = product[1] = product[2] = product[3] = 0;
        }
      }
    };
    const bool stage_has_one_step = !Code::kHasSteps || 1 << group_shift >= Tile::kDepthTiles;
    for (int left = depth_tiles; left > 0; left -= Tile::kDepthTiles, slot.next()) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      Steps steps[kWarpStrips];
#pragma unroll
      for (int s = 0; s < kWarpStrips; ++s) steps[s] = Steps(pipeline, slot, s, group_shift);
      if (left >= Tile::kDepthTiles && stage_has_one_step) {
#pragma unroll
        for (int s = 0; s < kWarpStrips; ++s) steps[s].second = steps[s].first;
#pragma unroll
        for (int t = 0; t < Tile::kDepthTiles; ++t) multiply_tile(t, Tile::kDepthTiles, steps);
        add_products(0, steps);
      } else {
#pragma unroll 1
        for (int t = 0; t < min(left, Tile::kDepthTiles); ++t) {
          multiply_tile(t, min(left, Tile::kDepthTiles), steps);
          add_products(t, steps);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(pipeline.empty(slot.index));
    }
  }

  // The same by wgmma.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void multiply_wgmma(int depth_tiles, int group_shift, const Pipeline& pipeline,
                                                        Slot& slot, const Code& code,
                                                        float (&sums)[kTiles0 + kTiles1][4]) {
    float(&sums0)[kTiles0][4] = reinterpret_cast<float(&)[kTiles0][4]>(sums[0]);
    float(&sums1)[kTiles1 + (kTiles1 == 0)][4] =
        reinterpret_cast<float(&)[kTiles1 + (kTiles1 == 0)][4]>(sums[kTiles1 ? kTiles0 : 0]);
    using Words = typename Code::Words;
    const int lane = threadIdx.x % 32;
    auto multiply_tile = [&](const Words& words, uint32_t steps, int tile) __attribute__((always_inline)) {
      uint32_t a0[4], a1[4];
      code.template decode<(kTiles1 > 0)>(words, a0, a1);
      if constexpr (Code::kHasSteps) {
        multiply_by_steps(a0, steps);
        if constexpr (kTiles1 > 0) multiply_by_steps(a1, steps);
      }
      const uint32_t tokens = pipeline.stage(slot.index) + tile * 32;
      wgmma_fence();
      wgmma_m64k16<8 * kTiles0>(sums0, a0, wgmma_descriptor(tokens));
      if constexpr (kTiles1 > 0)
        wgmma_m64k16<8 * kTiles1>(sums1, a1, wgmma_descriptor(tokens + Tile::kPartTokens * 128));
      wgmma_commit();
    };
    int finished = -1;  // slot whose products are still in flight
    auto release = [&] {
      if (lane == 0 && finished >= 0) barrier_arrive(pipeline.empty(finished));
    };

    // One tile is always being multiplied while the next is decoded, also from one stage to the next.
    for (int whole = depth_tiles / Tile::kDepthTiles; whole > 0; --whole) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      fence_async_proxy();
      const Steps steps(pipeline, slot, 0, group_shift);
      Words words[Tile::kDepthTiles];
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t)
        words[t] = code.load(tile_at(pipeline, slot, 0, t, Tile::kDepthTiles), lane);
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) {
        multiply_tile(words[t], steps.of(t), t);
        wgmma_wait<1>();
        if (t == 0) release();
      }
      finished = slot.index;
      slot.next();
    }
    wgmma_wait<0>();
    release();
    if (const int rest = depth_tiles % Tile::kDepthTiles) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      fence_async_proxy();
      const Steps steps(pipeline, slot, 0, group_shift);
#pragma unroll 1
      for (int t = 0; t < rest; ++t) {
        multiply_tile(code.load(tile_at(pipeline, slot, 0, t, rest), lane), steps.of(t), t);
        wgmma_wait<0>();
      }
      finished = slot.index;
      release();
      slot.next();
    }
  }

  // Where the sums of the piece that a dealer leaves are, this lane's of one token tile; and whether they are there.
  __device__ static float4* left_sums(const GroupedGemm& gemm, int dealer, int s, int tile) {
    constexpr int kTiles = Tile::kTokens / 8;
    const int strip = s * Tile::kWarps + threadIdx.x / 32;
    return gemm.partials + ((block_of(dealer) * Tile::kStrips + strip) * kTiles + tile) * 32 + threadIdx.x % 32;
  }
  __device__ static int* left_flag(const GroupedGemm& gemm, int dealer) {
    return gemm.arrivals + block_of(dealer) * Tile::kConsumers + threadIdx.x / 128;
  }

  // Leaves the sums of a piece that is not an item's start; a block has one at most, its first.
  template <int kTiles>
  __device__ static void leave_sums(const GroupedGemm& gemm, const float (&sums)[Tile::kWarpStrips][kTiles][4]) {
#pragma unroll
    for (int s = 0; s < Tile::kWarpStrips; ++s)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float(&sum)[4] = sums[s][j];
        __stcg(left_sums(gemm, own_dealer(), s, j), make_float4(sum[0], sum[1], sum[2], sum[3]));
      }
    warpgroup_barrier(1 + threadIdx.x / 128);
    if (threadIdx.x % 128 == 0) {
      __threadfence();
      store_release(left_flag(gemm, own_dealer()), 1);
    }
  }

  // Adds the sums that the next dealers up to the last have left, in their order.
  template <int kTiles>
  __device__ static void add_sums(const GroupedGemm& gemm, int last_dealer,
                                  float (&sums)[Tile::kWarpStrips][kTiles][4]) {
    for (int dealer = own_dealer() + 1; dealer <= last_dealer; ++dealer) {
      if (threadIdx.x % 128 == 0) {
        while (!load_acquire(left_flag(gemm, dealer))) {
        }
        *left_flag(gemm, dealer) = 0;  // for the next launch
      }
      warpgroup_barrier(1 + threadIdx.x / 128);
#pragma unroll
      for (int s = 0; s < Tile::kWarpStrips; ++s)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const float4 other = __ldcg(left_sums(gemm, dealer, s, j));
          sums[s][j][0] += other.x, sums[s][j][1] += other.y, sums[s][j][2] += other.z, sums[s][j][3] += other.w;
        }
    }
  }

  // Calls consume with the narrowest products that hold the parts' tokens.  Their widths have to be known at compile
  // time, and deciding outside the loop over the stages leaves nothing in it that the compiler takes for divergence.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void consume_parts(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                       const Launch& launch, const Piece& piece, const WorkItem& work,
                                                       int count0, int count1, Slot& slot) {
    constexpr int kStep = Tile::kWidthStep / 8, kMost = Tile::kPartTokens / 8;
    if constexpr (kTiles1 == 0 && kTiles0 < kMost)
      if (count0 > 8 * kTiles0)
        return consume_parts<kTiles0 + kStep, 0>(gemm, pipeline, launch, piece, work, count0, count1, slot);
    if constexpr (kTiles1 < kMost)
      if (count1 > 8 * kTiles1)
        return consume_parts<kTiles0, kTiles1 + kStep>(gemm, pipeline, launch, piece, work, count0, count1, slot);
    consume<kTiles0, kTiles1>(gemm, pipeline, launch, piece, work, slot);
  }

  __device__ __forceinline__ static void consume_all(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                     const Launch& launch) {
    Slot slot;
    Walk walk(gemm, launch);
    for (Piece piece; walk.next(launch, piece);) {
      const WorkItem work = launch.work(gemm, piece);
      const int count0 = uniform(work.group.count[0]), count1 = uniform(work.group.count[1]);
      if constexpr (!Tile::kWgmma) {
        if (uniform(joined(work.group))) {
          if (count0 + count1 <= 8) consume_joined<1>(gemm, pipeline, launch, piece, work, slot);
          else consume_joined<Tile::kJoinedTokens / 8>(gemm, pipeline, launch, piece, work, slot);
          continue;
        }
      }
      consume_parts<Tile::kWidthStep / 8, 0>(gemm, pipeline, launch, piece, work, count0, count1, slot);
    }
  }

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const Pipeline pipeline{shared};
    fill_table<Code>(gemm, pipeline.table());
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(pipeline.full(s), kTokenThreads + 1);  // the gathered tokens, and the words' expected bytes
        barrier_init(pipeline.empty(s), 4 * Tile::kConsumers);
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
      if (warp < 2) gather_tokens(gemm, pipeline, launch);
      else if (warp == 2) copy_words(gemm, pipeline, launch);
    } else {
      registers_up<Tile::kMultiplyRegisters>();
      consume_all(gemm, pipeline, launch);
    }
  }
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void gemm_hopper(const __grid_constant__ GroupedGemm gemm) {
  HopperKernel<Code, Tile, kGateUp>::run(gemm);
}
