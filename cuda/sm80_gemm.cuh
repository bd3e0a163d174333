// Grouped GEMM with mma.sync, compute capability 8.0 and later: weights are the 16-row A operand, decoded in registers
// from cp.async stages; tokens are the 8-column B operand.
//
// With few tokens the time is that of reading the words, so tiles are low and deep: the warps of a block split the
// depth of a few strips and add up once per item, which gives every multiprocessor work at one token.
#pragma once
#include "grouped.cuh"

template <int kPartTokens_, int kRowWarps_, int kDepthWarps_, int kWarpStrips_, int kDepth_, int kStages_>
struct Sm80Tile {
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kRowWarps = kRowWarps_;      // warps side by side over the rows
  static constexpr int kDepthWarps = kDepthWarps_;  // warps that share a row and split a stage's depth
  static constexpr int kWarpStrips = kWarpStrips_;  // 16-row strips per warp
  static constexpr int kDepth = kDepth_;            // columns per stage
  static constexpr int kMostStages = kStages_, kTableStride = 128;

  static constexpr int kWarps = kRowWarps * kDepthWarps, kThreads = 32 * kWarps;
  static constexpr int kStrips = kRowWarps * kWarpStrips;
  static constexpr int kTokens = 2 * kPartTokens, kTokenTiles = kTokens / 8;
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
  static constexpr int kSumBytes = kRowWarps * (kDepthWarps - 1) * 32 * kWarpStrips * kTokenTiles * 16;
};

template <class Code, class Tile, bool kGateUp>
struct Sm80Gemm {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kGroups = Code::kHasSteps ? Tile::kDepthTiles / kMinGroupTiles : 0;  // of a stage, at most
  static constexpr int kStageBytes = kWeightBytes + Tile::kTokenBytes + kGroups * Tile::kStrips * kStripStepBytes;
  static constexpr int kTableBytes = Code::kTableEntries * Tile::kTableStride;
  static constexpr int kSharedLimit = 99 * 1024;  // of compute capability 8.6 and 8.9
  static constexpr int kRoom = (kSharedLimit - kTableBytes - Tile::kSumBytes) / kStageBytes;
  static constexpr int kStages = kRoom < Tile::kMostStages ? kRoom : Tile::kMostStages;
  static constexpr int kSharedBytes = kTableBytes + kStages * kStageBytes + Tile::kSumBytes;

  // Token tiles that are multiplied or skipped together: of one part, or one of each where a part is a single tile.
  static constexpr int kTokenBlock = Tile::kPartTokens < 64 ? 2 : 4;
  using Accumulators = float[Tile::kWarpStrips][Tile::kTokenTiles][4];

  // Copies one item's stages in order; knows nothing of what is computed.
  struct Loader {
    const GroupedGemm& gemm;
    uint8_t* shared;
    int first_group, row_tiles, items;
    int item, slot = 0, tile = 0;  // of the next stage
    WorkItem work, next;           // read one item ahead, since its reads depend on one another
    int strips;
    const uint8_t* weights;        // of the item's unit

    // Words: threads copy the chunks that are kPassBytes apart in the stage, whole strips or whole parts of a strip.
    static constexpr int kBlockBytes = Tile::kThreads * 16;
    static constexpr int pass_strips() {  // a power of two
      int strips = 1;
      while (2 * strips * kStripBytes <= kBlockBytes && strips < Tile::kStrips) strips *= 2;
      return strips;
    }
    static constexpr int kPassBytes = kStripBytes > kBlockBytes ? kBlockBytes : pass_strips() * kStripBytes;
    static constexpr int kWordChunks = kWeightBytes / kPassBytes;
    static_assert(kWeightBytes % kPassBytes == 0 && (kPassBytes % kStripBytes == 0 || kStripBytes % kPassBytes == 0));
    static_assert(kGroups * Tile::kStrips * kStripStepBytes <= kBlockBytes);
    // Tokens: neighbouring threads copy one token's columns.  A thread's tokens are a multiple of eight apart, so that
    // its place in the swizzle never changes.
    static constexpr int kRowChunks = Tile::kDepth / 8;
    static constexpr int kTokenStep = Tile::kThreads / kRowChunks, kTokenChunks = Tile::kTokens / kTokenStep;
    static_assert(Tile::kThreads % kRowChunks == 0 && Tile::kTokens % kTokenStep == 0 && kTokenStep % 8 == 0);
    static constexpr uint32_t kNone = ~0u;
    uint32_t places[kTokenChunks];  // in the activations, in 16-byte vectors

    __device__ Loader(const GroupedGemm& gemm, uint8_t* shared, int first_group, int row_tiles, int items)
        : gemm(gemm), shared(shared), first_group(first_group), row_tiles(row_tiles), items(items), item(blockIdx.x) {
      if (item >= items) return;
      next = WorkItem(gemm.groups, first_group, item, row_tiles);
      start_item();
    }

    __device__ void start_item() {
      work = next;
      if (item + gridDim.x < items) next = WorkItem(gemm.groups, first_group, item + gridDim.x, row_tiles);
      strips = gemm.rows / 16 - work.row_tile * Tile::kStrips;
      weights = unit_weights<Code>(gemm, work.group.unit);
#pragma unroll
      for (int i = 0; i < kTokenChunks; ++i) {
        const int token = threadIdx.x / kRowChunks + i * kTokenStep;
        const int row = work.group.sorted_row(token / Tile::kPartTokens, token % Tile::kPartTokens);
        places[i] = row >= 0 ? activation_row<kGateUp>(gemm, row) * (gemm.depth / 8) : kNone;
      }
    }

    // Starts the copies of the next stage, if there is one, and closes their group either way.
    __device__ void load_stage() {
      if (item < items) {
        const int tiles = gemm.depth / 16;
        uint32_t to = shared_address(shared + slot * kStageBytes) + threadIdx.x * 16;
        asm("" : "+r"(to));  // else it is computed anew for every copy
#pragma unroll
        for (int i = 0; i < kWordChunks; ++i) {
          if (kPassBytes < kBlockBytes && threadIdx.x * 16 >= kPassBytes) break;
          const int at = threadIdx.x * 16 + i * kPassBytes, byte = at % kStripBytes;
          const int strip = at / kStripBytes, own_tile = tile + byte / Code::kTileBytes;
          if (strip < strips && own_tile < tiles)
            cp_async_16(to + i * kPassBytes,
                        weights + byte % Code::kTileBytes +
                            tile_offset<Code>(gemm, work.row_tile * Tile::kStrips + strip, own_tile));
        }

        const int column = threadIdx.x % kRowChunks, token = threadIdx.x / kRowChunks;
        to += kWeightBytes - threadIdx.x * 16 + token * Tile::kDepth * 2 + (column ^ (token & 7)) * 16;
        const uint4* from = reinterpret_cast<const uint4*>(gemm.activations) + tile * 2 + column;
        asm("" : "+r"(to), "+l"(from));
        if (tile * 2 + column < tiles * 2) {
#pragma unroll
          for (int i = 0; i < kTokenChunks; ++i)
            if (places[i] != kNone) cp_async_16(to + i * kTokenStep * Tile::kDepth * 2, from + places[i]);
        }
        if constexpr (Code::kHasSteps) load_steps();
        slot = slot + 1 == kStages ? 0 : slot + 1;
        tile += Tile::kDepthTiles;
        if (tile >= tiles) {
          tile = 0;
          item += gridDim.x;
          if (item < items) start_item();
        }
      }
      cp_async_commit();
    }

    // The stage's steps, [groups][strips]: a thread copies those of eight rows at most.
    __device__ void load_steps() {
      constexpr int kGroupBytes = Tile::kStrips * kStripStepBytes;
      const int group = threadIdx.x * 16 / kGroupBytes, byte = threadIdx.x * 16 % kGroupBytes;
      const int group_tile = tile + (group << gemm.group_shift);
      if (group_tile < min(tile + Tile::kDepthTiles, gemm.depth / 16) && byte / kStripStepBytes < strips)
        cp_async_16(shared_address(shared + slot * kStageBytes + kWeightBytes + Tile::kTokenBytes) + threadIdx.x * 16,
                    strip_steps(gemm, work.group.unit, group_tile, work.row_tile * Tile::kStrips) + byte);
    }
  };

  // One stage's products for this warp's strips and depth tiles.  Columns of absent tokens hold stale values: they
  // reach no other column and are never stored.
  __device__ static void multiply(const uint8_t* stage, const TokenGroup& group, const Code& code,
                                  int depth_tiles, int group_shift, Accumulators& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_warp = warp % Tile::kRowWarps, depth_warp = warp / Tile::kRowWarps;
    const uint32_t words_at = shared_address(stage), tokens = words_at + kWeightBytes;
#pragma unroll
    for (int t = 0; t < Tile::kDepthTiles; t += Tile::kDepthWarps) {
      const int tile = t + depth_warp;
      if (tile >= depth_tiles) break;
      uint32_t a[Tile::kWarpStrips][2][4];
#pragma unroll
      for (int s = 0; s < Tile::kWarpStrips; ++s) {
        const int strip = row_warp * Tile::kWarpStrips + s;
        const auto entries =
            code.look_up(code.load(words_at + strip * kStripBytes + tile * Code::kTileBytes, lane, tile % 2));
        const bool two = group.count[1] > 0;
        if (two && (group.positions == 2 || !Code::kPositionsCost)) {
          code.template take_apart<true>(entries, a[s][0], a[s][1]);
        } else {
          code.template take_apart<false>(entries, a[s][0], a[s][1]);
          if constexpr (Code::kPositionsCost) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[s][1][i] = a[s][0][i];
          }
        }
        if constexpr (Code::kHasSteps) {
          const uint32_t steps = reinterpret_cast<const uint32_t*>(stage + kWeightBytes + Tile::kTokenBytes)[
              ((tile >> group_shift) * Tile::kStrips + strip) * (kStripStepBytes / 4) + lane / 4];
          multiply_by_steps(a[s][0], steps);
          if (two) multiply_by_steps(a[s][1], steps);
        }
      }
#pragma unroll
      for (int block = 0; block < Tile::kTokenTiles; block += kTokenBlock) {
        const int part0 = block * 8 / Tile::kPartTokens, part1 = (block + 1) * 8 / Tile::kPartTokens;
        const bool some0 = block * 8 % Tile::kPartTokens < group.count[part0];
        const bool some1 = part0 == part1 ? some0 : group.count[part1] > 0;
        if (!some0 && !some1) continue;
#pragma unroll
        for (int j = block; j < block + kTokenBlock; j += 2) {
          uint32_t b[4];
          const int token = j * 8 + lane % 8 + (lane / 16) * 8, column = tile * 2 + (lane / 8) % 2;
          ldmatrix_x4(b, tokens + token * Tile::kDepth * 2 + ((column ^ (token & 7)) * 16));
#pragma unroll
          for (int s = 0; s < Tile::kWarpStrips; ++s) {
            if (some0) mma_m16n8k16(sums[s][j], a[s][part0], b[0], b[1]);
            if (some1) mma_m16n8k16(sums[s][j + 1], a[s][part1], b[2], b[3]);
          }
        }
      }
    }
  }

  // Adds the depth warps' sums, in their order, into those of depth warp 0.
  __device__ static void sum_depth(float4* exchange, Accumulators& sums) {
    constexpr int kTiles = Tile::kWarpStrips * Tile::kTokenTiles;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_warp = warp % Tile::kRowWarps, depth_warp = warp / Tile::kRowWarps;
    auto place = [&](int from, int tile) {
      return ((row_warp * (Tile::kDepthWarps - 1) + from) * kTiles + tile) * 32 + lane;
    };
    if (depth_warp > 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const float(&sum)[4] = sums[i / Tile::kTokenTiles][i % Tile::kTokenTiles];
        exchange[place(depth_warp - 1, i)] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
    __syncthreads();
    if (depth_warp == 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float(&sum)[4] = sums[i / Tile::kTokenTiles][i % Tile::kTokenTiles];
#pragma unroll
        for (int from = 0; from < Tile::kDepthWarps - 1; ++from) {
          float4 other = exchange[place(from, i)];
          sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
        }
      }
    }
  }

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    const uint32_t table = fill_table<Code, Tile::kThreads>(gemm, shared_address(shared_memory));
    uint8_t* shared = shared_memory + kTableBytes;
    wait_for_previous_kernel();
    let_next_kernel_start();
    float4* exchange = reinterpret_cast<float4*>(shared + kStages * kStageBytes);
    const int row_tiles = (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
    const int first_group = gemm.skips_pairs ? gemm.group_counts[0] : 0;
    const int items = (gemm.group_counts[gemm.skips_dense ? 0 : 1] - first_group) * row_tiles;
    const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % Tile::kRowWarps;
    const bool stores = threadIdx.x / 32 < Tile::kRowWarps;

    Loader loader(gemm, shared, first_group, row_tiles, items);
    for (int s = 0; s < kStages - 1; ++s) loader.load_stage();

    int slot = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const WorkItem work(gemm.groups, first_group, item, row_tiles);
      const bool dense = work.dense(gemm);
      const Code code(dense, work.position(0), work.position(1), table);
      Accumulators sums = {};
      for (int tile = 0; tile < gemm.depth / 16; tile += Tile::kDepthTiles) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the oldest stage is here for all, and nobody reads the one before it any more
        loader.load_stage();
        const uint8_t* stage = shared + slot * kStageBytes;
        multiply(stage, work.group, code, gemm.depth / 16 - tile, gemm.group_shift, sums);
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }
      if constexpr (Tile::kDepthWarps > 1) sum_depth(exchange, sums);
      if (!stores) continue;
      const float scale = Code::scale(dense);
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; ++j) {
        const int part = j * 8 / Tile::kPartTokens, first = j * 8 % Tile::kPartTokens;
        if (first >= work.group.count[part]) continue;
        const int sorted_row = work.group.sorted_row(part, first + lane / 4);
#pragma unroll
        for (int s = 0; s < Tile::kWarpStrips; ++s) {
          const int strip = work.row_tile * Tile::kStrips + row_warp * Tile::kWarpStrips + s;
          if (strip < gemm.rows / 16) store_tile<kGateUp>(gemm, strip, sorted_row, sums[s][j], scale);
        }
      }
    }
  }
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, 2) void sm80_gemm(const __grid_constant__ GroupedGemm gemm) {
  Sm80Gemm<Code, Tile, kGateUp>::run(gemm);
}
