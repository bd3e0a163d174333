// Grouped GEMM with wgmma, compute capability 9.0: weights are the 64-row A operand, decoded into registers; tokens
// are the B operand, read from shared memory by the tensor cores.
//
// One warpgroup fills the stages (bulk copies of words, cp.async gathers of tokens), two multiply.  The two are not
// kept in step: while one decodes, the other's products keep the tensor cores busy.
#pragma once
#define PM_HOPPER
#include "grouped.cuh"

template <int kPartTokens_, int kStages_>
struct WgmmaTile {
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = 2;  // warpgroups that multiply, 64 rows each
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStrips = 4 * kConsumers;
  static constexpr int kTokens = 2 * kPartTokens;
  static constexpr int kDepth = 64;  // columns per stage: 128 bytes of a token, one swizzle row
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
};

template <class Code, class Tile, bool kGateUp>
struct WgmmaKernel {
  static constexpr int kStripBytes = Tile::kDepthTiles * Code::kTileBytes;  // of a stage
  static constexpr int kWeightBytes = Tile::kStrips * kStripBytes;
  static constexpr int kStageBytes = Tile::kTokenBytes + kWeightBytes;
  static constexpr int kBarrierBytes = Tile::kStages * 16;
  static constexpr int kSharedBytes = Tile::kStages * kStageBytes + kBarrierBytes + 1024;  // aligned by the kernel

  // The token copies of a stage are announced this many stages later: each producer thread waits for its own copies
  // and fences them for the tensor cores before it arrives.
  static constexpr int kLag = Tile::kStages / 2;

  struct Pipeline {
    uint32_t stages, barriers;

    __device__ uint32_t stage(int slot) const { return stages + slot * kStageBytes; }
    __device__ uint32_t full(int slot) const { return barriers + slot * 16; }
    __device__ uint32_t empty(int slot) const { return barriers + slot * 16 + 8; }
  };

  struct Slot {
    int index = 0, parity = 0;
    __device__ void next() {
      if (++index == Tile::kStages) index = 0, parity ^= 1;
    }
  };

  __device__ static void produce(const GroupedGemm& gemm, const Pipeline& pipeline, int row_tiles, int items) {
    constexpr int kTokenStep = 128 / 8, kTokensPerThread = Tile::kTokens / kTokenStep;
    const int thread = threadIdx.x % 128, column = thread % 8;
    const int depth_tiles = gemm.depth / 16, row_vectors = gemm.depth / 8;
    const uint4* activations = reinterpret_cast<const uint4*>(gemm.activations);
    Slot slot, announced;
    int copied = 0;
    auto announce = [&] {
      fence_async_proxy();
      barrier_arrive(pipeline.full(announced.index));
      announced.next();
    };

    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const WorkItem work(gemm, item, row_tiles);
      const int strips = min(Tile::kStrips, gemm.rows / 16 - work.row_tile * Tile::kStrips);
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit) +
                               int64_t(work.row_tile * Tile::kStrips + thread) * depth_tiles * Code::kTileBytes;
      // Place of each of this thread's tokens in 16-byte vectors, which 32 bits can hold; ~0: no such token.
      uint32_t tokens[kTokensPerThread];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int token = thread / 8 + i * kTokenStep;
        const int part = token / Tile::kPartTokens, row = token % Tile::kPartTokens;
        tokens[i] = row < work.group.count[part]
                        ? activation_row<kGateUp>(gemm, work.group.start[part] + row) * row_vectors + column
                        : ~0u;
      }
      for (int tile = 0; tile < depth_tiles; tile += Tile::kDepthTiles) {
        barrier_wait(pipeline.empty(slot.index), slot.parity ^ 1);
        const uint32_t to = pipeline.stage(slot.index);
        const int strip_bytes = min(Tile::kDepthTiles, depth_tiles - tile) * Code::kTileBytes;
        if (thread == 0) barrier_arrive_expect(pipeline.full(slot.index), strips * strip_bytes);
        if (thread < 32) {
          __syncwarp();  // the bytes are expected before the first of them can arrive
          if (thread < strips)
            bulk_copy(to + Tile::kTokenBytes + thread * kStripBytes, weights + tile * Code::kTileBytes, strip_bytes,
                      pipeline.full(slot.index));
        }
        const int vector = tile * 2;
        if (vector + column < row_vectors) {
#pragma unroll
          for (int i = 0; i < kTokensPerThread; ++i) {
            const int token = thread / 8 + i * kTokenStep;
            if (tokens[i] != ~0u)
              cp_async_16(to + token * 128 + ((column ^ (token & 7)) * 16), activations + (tokens[i] + vector));
          }
        }
        cp_async_commit();
        slot.next();
        if (++copied > kLag) {
          cp_async_wait<kLag>();
          announce();
        }
      }
    }
    cp_async_wait<0>();
    for (int rest = min(copied, kLag); rest > 0; --rest) announce();
  }

  // All stages of one item for one warpgroup: kColumns0 tokens of part 0 and kColumns1 of part 1.
  template <int kColumns0, int kColumns1>
  __device__ static void multiply(const GroupedGemm& gemm, const Pipeline& pipeline, Slot& slot,
                                  const Code (&codes)[2], float (&sums0)[Tile::kPartTokens / 8][4], float (&sums1)[Tile::kPartTokens / 8][4]) {
    using Words = typename Code::Words;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float(&d0)[kColumns0 / 8][4] = reinterpret_cast<float(&)[kColumns0 / 8][4]>(sums0);
    float(&d1)[(kColumns1 ? kColumns1 : 8) / 8][4] = reinterpret_cast<float(&)[(kColumns1 ? kColumns1 : 8) / 8][4]>(sums1);

    auto words_at = [&](uint32_t stage, int tile) {
      const void* from = __cvta_shared_to_generic(stage + Tile::kTokenBytes + warp * kStripBytes +
                                                  tile * Code::kTileBytes + lane * sizeof(Words));
      return *static_cast<const Words*>(from);
    };
    auto multiply_tile = [&](const Words& words, uint32_t stage, int tile) {
      uint32_t a0[4], a1[4];
      codes[0].decode(words, a0);
      if constexpr (kColumns1 > 0) codes[1].decode(words, a1);
      const uint64_t b = wgmma_descriptor(stage) + tile * 2;
      wgmma_fence();
      wgmma_m64k16<kColumns0>(d0, a0, b);
      if constexpr (kColumns1 > 0) wgmma_m64k16<kColumns1>(d1, a1, b + Tile::kPartTokens * 128 / 16);
      wgmma_commit();
    };
    auto finish_stage = [&] {
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(pipeline.empty(slot.index));
      slot.next();
    };

    const int depth_tiles = gemm.depth / 16;
    for (int whole = depth_tiles / Tile::kDepthTiles; whole > 0; --whole) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      const uint32_t stage = pipeline.stage(slot.index);
      Words words[Tile::kDepthTiles];
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) words[t] = words_at(stage, t);
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) multiply_tile(words[t], stage, t);
      finish_stage();
    }
    if (const int rest = depth_tiles % Tile::kDepthTiles) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      const uint32_t stage = pipeline.stage(slot.index);
      for (int t = 0; t < rest; ++t) {
        multiply_tile(words_at(stage, t), stage, t);
        wgmma_wait<0>();
      }
      finish_stage();
    }
  }

  __device__ static void consume_item(const GroupedGemm& gemm, const Pipeline& pipeline, Slot& slot,
                               const WorkItem& work) {
    constexpr int kWhole = Tile::kPartTokens, kHalf = kWhole / 2;
    const TokenGroup& group = work.group;
    const int count0 = uniform(group.count[0]), count1 = uniform(group.count[1]);
    const bool dense = work.dense(gemm);
    const Code codes[2] = {Code(dense, work.position(0)), Code(dense, work.position(1))};
    float sums[2][kWhole / 8][4] = {};
    auto run = [&](auto columns0, auto columns1) {
      multiply<decltype(columns0)::value, decltype(columns1)::value>(gemm, pipeline, slot, codes, sums[0], sums[1]);
    };
    constexpr Columns<0> none;
    constexpr Columns<kHalf> half;
    constexpr Columns<kWhole> whole;
    if (count0 > kHalf) {
      if (count1 > kHalf) run(whole, whole);
      else if (count1 > 0) run(whole, half);
      else run(whole, none);
    } else {
      if (count1 > kHalf) run(half, whole);
      else if (count1 > 0) run(half, half);
      else run(half, none);
    }

    const int lane = threadIdx.x % 32;
    const int strip = work.row_tile * Tile::kStrips + threadIdx.x / 32;
    if (strip >= gemm.rows / 16) return;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int j = 0; j < kWhole / 8; ++j) {
        if (j * 8 >= group.count[part]) break;
        const int token = j * 8 + lane / 4;
        store_tile<kGateUp>(gemm, strip, token < group.count[part] ? group.start[part] + token : -1, sums[part][j],
                            Code::scale(dense));
      }
    }
  }

  __device__ static void run(const GroupedGemm& gemm) {
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
    const Pipeline pipeline{base, base + Tile::kStages * kStageBytes};
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::kStages; ++s) {
        barrier_init(pipeline.full(s), 128 + 1);  // the producers, and the expected bytes
        barrier_init(pipeline.empty(s), 4 * Tile::kConsumers);
      }
      barrier_init_visible();
    }
    __syncthreads();

    const int row_tiles = (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
    const int items = uniform(*gemm.group_count) * row_tiles;
    if (uniform(threadIdx.x / 128) == Tile::kConsumers) {
      registers_down<56>();
      produce(gemm, pipeline, row_tiles, items);
    } else {
      registers_up<224>();
      Slot slot;
      for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const WorkItem work(gemm, item, row_tiles);
        consume_item(gemm, pipeline, slot, work);
      }
    }
  }

 private:
  template <int kColumns>
  struct Columns {
    static constexpr int value = kColumns;
  };
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, 1) void gemm_wgmma(const __grid_constant__ GroupedGemm gemm) {
  WgmmaKernel<Code, Tile, kGateUp>::run(gemm);
}
