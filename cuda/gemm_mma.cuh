// Grouped GEMM with mma.sync, compute capability 8.0 and later: weights are the 16-row A operand, decoded in registers
// from cp.async stages; tokens are the 8-column B operand.
//
// With few tokens the time is that of reading the words, so tiles are low and deep: the warps of a block split the
// depth of a few strips and add up once per item, which gives every multiprocessor work at one token.
#pragma once
#include "grouped.cuh"

template <int kPartTokens_, int kRowWarps_, int kDepthWarps_, int kWarpStrips_, int kDepth_, int kStages_>
struct MmaTile {
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kRowWarps = kRowWarps_;      // warps side by side over the rows
  static constexpr int kDepthWarps = kDepthWarps_;  // warps that share a row and split a stage's depth
  static constexpr int kWarpStrips = kWarpStrips_;  // 16-row strips per warp
  static constexpr int kDepth = kDepth_;            // columns per stage
  static constexpr int kStages = kStages_;

  static constexpr int kWarps = kRowWarps * kDepthWarps, kThreads = 32 * kWarps;
  static constexpr int kStrips = kRowWarps * kWarpStrips;
  static constexpr int kTokens = 2 * kPartTokens, kTokenTiles = kTokens / 8;
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
  static constexpr int kSumBytes = kRowWarps * (kDepthWarps - 1) * 32 * kWarpStrips * kTokenTiles * 16;
};

template <class Code, class Tile, bool kGateUp>
struct MmaKernel {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kStageBytes = kWeightBytes + Tile::kTokenBytes;
  static constexpr int kSharedBytes = Tile::kStages * kStageBytes + Tile::kSumBytes;

  using Accumulators = float[Tile::kWarpStrips][Tile::kTokenTiles][4];

  // Copies one item's stages in order; knows nothing of what is computed.
  struct Loader {
    const GroupedGemm& gemm;
    uint8_t* shared;
    int row_tiles, items;
    int item, stage = 0, slot = 0;
    const uint8_t* weights;  // the row tile's first strip
    int strips;

    static constexpr int kRowChunks = Tile::kDepth / 8;  // 16-byte chunks of one token's columns in a stage
    static constexpr int kTokenStep = Tile::kThreads / kRowChunks;
    static constexpr int kTokensPerThread = Tile::kTokens / kTokenStep;
    static_assert(Tile::kThreads % kRowChunks == 0 && Tile::kTokens % kTokenStep == 0);
    const __nv_bfloat16* tokens[kTokensPerThread];  // null: no such token

    __device__ Loader(const GroupedGemm& gemm, uint8_t* shared, int row_tiles, int items)
        : gemm(gemm), shared(shared), row_tiles(row_tiles), items(items), item(blockIdx.x) {
      if (item < items) start_item();
    }

    __device__ void start_item() {
      WorkItem work(gemm, item, row_tiles);
      strips = min(Tile::kStrips, gemm.rows / 16 - work.row_tile * Tile::kStrips);
      weights = unit_weights<Code>(gemm, work.group.unit) +
                int64_t(work.row_tile) * Tile::kStrips * (gemm.depth / 16) * Code::kTileBytes;
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        int token = threadIdx.x / kRowChunks + i * kTokenStep;
        int part = token / Tile::kPartTokens, row = token % Tile::kPartTokens;
        tokens[i] = row < work.group.count[part]
                        ? gemm.activations + activation_row<kGateUp>(gemm, work.group.start[part] + row) * gemm.depth
                        : nullptr;
      }
    }

    // Starts the copies of the next stage, if there is one, and closes their group either way.
    __device__ void load_stage() {
      if (item < items) {
        uint32_t to = shared_address(shared + slot * kStageBytes);
        const int tile = stage * Tile::kDepthTiles;
        const int valid_bytes = (gemm.depth / 16 - tile) * Code::kTileBytes;
        const int64_t stride = int64_t(gemm.depth / 16) * Code::kTileBytes;
#pragma unroll
        for (int at = threadIdx.x * 16; at < kWeightBytes; at += Tile::kThreads * 16) {
          const int strip = at / kStripBytes, byte = at % kStripBytes;
          if (strip < strips && byte < valid_bytes)
            cp_async_16(to + at, weights + strip * stride + tile * Code::kTileBytes + byte);
        }
        to += kWeightBytes;
        const int column = threadIdx.x % kRowChunks, first = stage * Tile::kDepth + column * 8;
        if (first < gemm.depth) {
#pragma unroll
          for (int i = 0; i < kTokensPerThread; ++i) {
            int token = threadIdx.x / kRowChunks + i * kTokenStep;
            if (tokens[i])
              cp_async_16(to + token * Tile::kDepth * 2 + ((column ^ (token & 7)) * 16), tokens[i] + first);
          }
        }
        slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
        if (++stage * Tile::kDepth >= gemm.depth) {
          stage = 0;
          item += gridDim.x;
          if (item < items) start_item();
        }
      }
      cp_async_commit();
    }
  };

  // One stage's products for this warp's strips and depth tiles.  Columns of absent tokens hold stale values: they
  // reach no other column and are never stored.
  __device__ static void multiply(const uint8_t* stage, const TokenGroup& group, const Code (&codes)[2],
                                  int depth_tiles, Accumulators& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_warp = warp % Tile::kRowWarps, depth_warp = warp / Tile::kRowWarps;
    const uint32_t tokens = shared_address(stage + kWeightBytes);
#pragma unroll
    for (int t = 0; t < Tile::kDepthTiles; t += Tile::kDepthWarps) {
      const int tile = t + depth_warp;
      if (tile >= depth_tiles) break;
      uint32_t a[Tile::kWarpStrips][2][4];
#pragma unroll
      for (int s = 0; s < Tile::kWarpStrips; ++s) {
        const int strip = row_warp * Tile::kWarpStrips + s;
        auto words = *reinterpret_cast<const typename Code::Words*>(
            stage + strip * kStripBytes + tile * Code::kTileBytes + lane * sizeof(typename Code::Words));
        codes[0].decode(words, a[s][0]);
        codes[1].decode(words, a[s][1]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; j += 2) {
        const int part0 = j * 8 / Tile::kPartTokens, part1 = (j + 1) * 8 / Tile::kPartTokens;
        const bool some0 = j * 8 % Tile::kPartTokens < group.count[part0];
        const bool some1 = (j + 1) * 8 % Tile::kPartTokens < group.count[part1];
        if (!some0 && !some1) continue;
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

  // Adds the depth warps' sums, in their order, into those of depth warp 0.
  __device__ static void sum_depth(float4* exchange, Accumulators& sums) {
    constexpr int kTiles = Tile::kWarpStrips * Tile::kTokenTiles;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_warp = warp % Tile::kRowWarps, depth_warp = warp / Tile::kRowWarps;
    auto place = [&](int from, int tile) { return ((row_warp * (Tile::kDepthWarps - 1) + from) * kTiles + tile) * 32 + lane; };
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

  __device__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(128) uint8_t shared[];
    float4* exchange = reinterpret_cast<float4*>(shared + Tile::kStages * kStageBytes);
    const int row_tiles = (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
    const int items = *gemm.group_count * row_tiles;
    const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % Tile::kRowWarps;
    const bool stores = threadIdx.x / 32 < Tile::kRowWarps;

    Loader loader(gemm, shared, row_tiles, items);
    for (int s = 0; s < Tile::kStages - 1; ++s) loader.load_stage();

    int slot = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const WorkItem work(gemm, item, row_tiles);
      const bool dense = work.dense(gemm);
      const Code codes[2] = {Code(dense, work.position(0)), Code(dense, work.position(1))};
      Accumulators sums = {};
      for (int tile = 0; tile < gemm.depth / 16; tile += Tile::kDepthTiles) {
        cp_async_wait<Tile::kStages - 2>();
        __syncthreads();  // the oldest stage is here for all, and nobody reads the one before it any more
        loader.load_stage();
        const uint8_t* stage = shared + slot * kStageBytes;
        multiply(stage, work.group, codes, gemm.depth / 16 - tile, sums);
        slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
      }
      if constexpr (Tile::kDepthWarps > 1) sum_depth(exchange, sums);
      if (!stores) continue;
      const float scale = Code::scale(dense);
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; ++j) {
        const int part = j * 8 / Tile::kPartTokens, token = j * 8 % Tile::kPartTokens + lane / 4;
        if (token - lane / 4 >= work.group.count[part]) continue;
        const int sorted_row = token < work.group.count[part] ? work.group.start[part] + token : -1;
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
__global__ __launch_bounds__(Tile::kThreads, 2) void gemm_mma(const __grid_constant__ GroupedGemm gemm) {
  MmaKernel<Code, Tile, kGateUp>::run(gemm);
}
