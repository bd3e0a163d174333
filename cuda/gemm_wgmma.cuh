// Grouped GEMM with wgmma, compute capability 9.0: weights are the 64-row A operand, decoded into registers; tokens
// are the B operand, read from shared memory by the tensor cores.
//
// One warp copies words, two gather tokens, two warpgroups multiply; only barriers of the stages connect them.
#pragma once
#define PM_HOPPER
#include "grouped.cuh"

template <int kPartTokens_, int kWidthStep_, int kStages_, int kMaxSplits_>
struct WgmmaTile {
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kWidthStep = kWidthStep_;    // widths that products come in, up to kPartTokens
  static constexpr int kStages = kStages_;
  static constexpr int kMaxSplits = kMaxSplits_;    // of an item's depth, among blocks
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
  static constexpr int kSharedBytes = Tile::kStages * (kStageBytes + 16);

  // The launch's work: items times splits, and which tiles of the depth a split has.
  struct Work {
    int row_tiles, splits, units;

    __device__ explicit Work(const GroupedGemm& gemm) {
      row_tiles = (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
      const int items = uniform(*gemm.group_count) * row_tiles;
      splits = Tile::kMaxSplits > 1 ? choose_splits(items, stages(gemm), gridDim.x, Tile::kMaxSplits) : 1;
      units = items * splits;
    }
    __device__ static int stages(const GroupedGemm& gemm) {
      return (gemm.depth / 16 + Tile::kDepthTiles - 1) / Tile::kDepthTiles;
    }
    __device__ int first_tile(const GroupedGemm& gemm, int split) const {
      return stages(gemm) * split / splits * Tile::kDepthTiles;
    }
    __device__ int end_tile(const GroupedGemm& gemm, int split) const {
      return min(first_tile(gemm, split + 1), gemm.depth / 16);
    }
  };

  // Shared memory: the stages, then two barriers of each.
  struct Pipeline {
    uint8_t* stages;

    __device__ uint32_t stage(int slot) const { return shared_address(stages) + slot * kStageBytes; }
    __device__ uint32_t full(int slot) const { return stage(Tile::kStages) + slot * 16; }
    __device__ uint32_t empty(int slot) const { return full(slot) + 8; }
  };

  static constexpr int kTokenThreads = 64;

  struct Slot {
    int index = 0, parity = 0;
    __device__ void next() {
      if (++index == Tile::kStages) index = 0, parity ^= 1;
    }
  };

  // One warp: a bulk copy per strip and stage.  Reads nothing that the kernel before writes, so that the first words of
  // the down projection arrive while gate and up still run elsewhere.
  __device__ static void copy_words(const GroupedGemm& gemm, const Pipeline& pipeline, const Work& launch) {
    const int lane = threadIdx.x % 32;
    Slot slot;
    for (int unit = blockIdx.x; unit < launch.units; unit += gridDim.x) {
      const WorkItem work(gemm, unit / launch.splits, launch.row_tiles);
      const int split = unit % launch.splits, end = launch.end_tile(gemm, split);
      const int strips = min(Tile::kStrips, gemm.rows / 16 - work.row_tile * Tile::kStrips);
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit) +
                               int64_t(work.row_tile * Tile::kStrips + lane) * (gemm.depth / 16) * Code::kTileBytes;
      for (int tile = launch.first_tile(gemm, split); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        const int bytes = min(Tile::kDepthTiles, end - tile) * Code::kTileBytes;
        const uint32_t full = pipeline.full(slot.index);
        barrier_wait(pipeline.empty(slot.index), slot.parity ^ 1);
        if (lane == 0) barrier_arrive_expect(full, strips * bytes);
        __syncwarp();  // the bytes are expected before the first of them can arrive
        if (lane < strips)
          bulk_copy(pipeline.stage(slot.index) + Tile::kTokenBytes + lane * kStripBytes,
                    weights + tile * Code::kTileBytes, bytes, full);
      }
    }
  }

  // Two warps: eight threads per token, 16 bytes each, swizzled as the descriptor says.  A thread's tokens are eight
  // apart, so that its place in the swizzle never changes.
  __device__ static void gather_tokens(const GroupedGemm& gemm, const Pipeline& pipeline, const Work& launch) {
    constexpr int kTokensPerThread = Tile::kTokens / 8;
    constexpr uint32_t kNone = ~0u;
    const int first = threadIdx.x / 8 % 8, column = threadIdx.x % 8;
    const uint32_t offset = first * 128 + (column ^ first) * 16;
    const int row_vectors = gemm.depth / 8;
    const uint4* activations = reinterpret_cast<const uint4*>(gemm.activations) + column;
    if constexpr (!kGateUp) wait_for_previous_kernel();
    Slot slot;
    for (int unit = blockIdx.x; unit < launch.units; unit += gridDim.x) {
      const WorkItem work(gemm, unit / launch.splits, launch.row_tiles);
      const int split = unit % launch.splits, end = launch.end_tile(gemm, split);
      uint32_t places[kTokensPerThread];  // in 16-byte vectors, so that 32 bits hold any
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int row = work.group.sorted_row(i * 8 / Tile::kPartTokens, i * 8 % Tile::kPartTokens + first);
        places[i] = row >= 0 ? activation_row<kGateUp>(gemm, row) * row_vectors : kNone;
      }
      for (int tile = launch.first_tile(gemm, split); tile < end; tile += Tile::kDepthTiles, slot.next()) {
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

  // Multiplies a split of an item: kColumns0 tokens of part 0 and kColumns1 of part 1.  Stores it, unless other blocks
  // have splits of the item that are still missing.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void consume(const GroupedGemm& gemm, const Pipeline& pipeline, const Work& launch,
                                                 int unit, const WorkItem& work, Slot& slot) {
    const int item = unit / launch.splits, split = unit % launch.splits;
    const bool dense = work.dense(gemm);
    float sums0[kColumns0 / 8][4] = {}, sums1[kColumns1 / 8 + (kColumns1 == 0)][4] = {};
    multiply<kColumns0, kColumns1>(launch.end_tile(gemm, split) - launch.first_tile(gemm, split), pipeline, slot,
                                   Code(dense, work.position(0)), Code(dense, work.position(1)), sums0, sums1);

    const int lane = threadIdx.x % 32;
    const int strip = work.row_tile * Tile::kStrips + threadIdx.x / 32;
    if (strip >= gemm.rows / 16) return;
    if (launch.splits > 1) {
      leave_partial(gemm, launch.splits, item, split, 0, sums0);
      if (kColumns1 > 0) leave_partial(gemm, launch.splits, item, split, kColumns0 / 8, sums1);
      if (!is_last(gemm, launch.splits, item)) return;
      sum_partials(gemm, launch.splits, item, 0, sums0);
      if (kColumns1 > 0) sum_partials(gemm, launch.splits, item, kColumns0 / 8, sums1);
    }
    auto store = [&](int part, auto& sums) __attribute__((always_inline)) {
#pragma unroll
      for (int j = 0; j < int(sizeof sums / sizeof *sums); ++j) {
        if (j * 8 >= work.group.count[part]) break;
        const int sorted_row = work.group.sorted_row(part, j * 8 + lane / 4);
        store_tile<kGateUp>(gemm, strip, sorted_row, sums[j], Code::scale(dense));
      }
    };
    store(0, sums0);
    if (kColumns1 > 0) store(1, sums1);
  }

  // The stages of one split for one warpgroup.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void multiply(int depth_tiles, const Pipeline& pipeline, Slot& slot,
                                                  const Code& code0, const Code& code1,
                                                  float (&sums0)[kColumns0 / 8][4],
                                                  float (&sums1)[kColumns1 / 8 + (kColumns1 == 0)][4]) {
    using Words = typename Code::Words;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint8_t* lane_words = pipeline.stages + Tile::kTokenBytes + warp * kStripBytes + lane * sizeof(Words);
    auto words_at = [&](int tile) {
      return *reinterpret_cast<const Words*>(lane_words + slot.index * kStageBytes + tile * Code::kTileBytes);
    };
    auto multiply_tile = [&](const Words& words, int tile) __attribute__((always_inline)) {
      uint32_t a0[4], a1[4];
      code0.decode(words, a0);
      if constexpr (kColumns1 > 0) code1.decode(words, a1);
      const uint32_t tokens = pipeline.stage(slot.index) + tile * 32;
      wgmma_fence();
      wgmma_m64k16<kColumns0>(sums0, a0, wgmma_descriptor(tokens));
      if constexpr (kColumns1 > 0)
        wgmma_m64k16<kColumns1>(sums1, a1, wgmma_descriptor(tokens + Tile::kPartTokens * 128));
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
      Words words[Tile::kDepthTiles];
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) words[t] = words_at(t);
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) {
        multiply_tile(words[t], t);
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
#pragma unroll 1
      for (int t = 0; t < rest; ++t) {
        multiply_tile(words_at(t), t);
        wgmma_wait<0>();
      }
      finished = slot.index;
      release();
      slot.next();
    }
  }

  // Where this lane's sums of a split and token tile wait for the other splits'.
  __device__ static float4* partial(const GroupedGemm& gemm, int unit, int tile) {
    constexpr int kTiles = Tile::kTokens / 8;
    return gemm.partials + ((unit * Tile::kStrips + threadIdx.x / 32) * kTiles + tile) * 32 + threadIdx.x % 32;
  }

  template <int kTiles>
  __device__ static void leave_partial(const GroupedGemm& gemm, int splits, int item, int split, int first_tile,
                                       const float (&sums)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      __stcg(partial(gemm, item * splits + split, first_tile + j),
             make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
  }

  // Whether all other splits of this warp's rows are there.
  __device__ static bool is_last(const GroupedGemm& gemm, int splits, int item) {
    __threadfence();
    __syncwarp();
    int earlier = 0;
    if (threadIdx.x % 32 == 0)
      earlier = atomicAdd(gemm.arrivals + item * Tile::kStrips + threadIdx.x / 32, 1);
    if (uniform(earlier) != splits - 1) return false;
    __threadfence();
    return true;
  }

  // The sum over the splits in their order, whichever came last.
  template <int kTiles>
  __device__ static void sum_partials(const GroupedGemm& gemm, int splits, int item, int first_tile,
                                      float (&sums)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float4 sum = __ldcg(partial(gemm, item * splits, first_tile + j));
      for (int split = 1; split < splits; ++split) {
        const float4 other = __ldcg(partial(gemm, item * splits + split, first_tile + j));
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
      }
      sums[j][0] = sum.x, sums[j][1] = sum.y, sums[j][2] = sum.z, sums[j][3] = sum.w;
    }
  }

  // Calls consume with the narrowest products that hold the parts' tokens.  Their widths have to be known at compile
  // time, and deciding outside the loop over the stages leaves nothing in it that the compiler takes for divergence.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void consume_columns(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                         const Work& launch, int unit, const WorkItem& work,
                                                         int count0, int count1, Slot& slot) {
    constexpr int kStep = Tile::kWidthStep;
    if constexpr (kColumns1 == 0 && kColumns0 < Tile::kPartTokens)
      if (count0 > kColumns0)
        return consume_columns<kColumns0 + kStep, 0>(gemm, pipeline, launch, unit, work, count0, count1, slot);
    if constexpr (kColumns1 < Tile::kPartTokens)
      if (count1 > kColumns1)
        return consume_columns<kColumns0, kColumns1 + kStep>(gemm, pipeline, launch, unit, work, count0, count1, slot);
    consume<kColumns0, kColumns1>(gemm, pipeline, launch, unit, work, slot);
  }

  __device__ __forceinline__ static void consume_all(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                     const Work& launch) {
    Slot slot;
    for (int unit = blockIdx.x; unit < launch.units; unit += gridDim.x) {
      const WorkItem work(gemm, unit / launch.splits, launch.row_tiles);
      consume_columns<Tile::kWidthStep, 0>(gemm, pipeline, launch, unit, work, uniform(work.group.count[0]),
                                           uniform(work.group.count[1]), slot);
    }
  }

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const Pipeline pipeline{shared};
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::kStages; ++s) {
        barrier_init(pipeline.full(s), kTokenThreads + 1);  // the gathered tokens, and the words' expected bytes
        barrier_init(pipeline.empty(s), 4 * Tile::kConsumers);
      }
      barrier_init_visible();
    }
    __syncthreads();

    // The groups come from a kernel that had ended before gate and up let the down projection start.
    if constexpr (kGateUp) wait_for_previous_kernel();
    let_next_kernel_start();
    const Work launch(gemm);
    if (uniform(threadIdx.x / 128) == Tile::kConsumers) {
      registers_down<72>();
      const int warp = uniform(threadIdx.x % 128 / 32);
      if (warp < 2) gather_tokens(gemm, pipeline, launch);
      else if (warp == 2) copy_words(gemm, pipeline, launch);
    } else {
      registers_up<216>();
      consume_all(gemm, pipeline, launch);
    }
  }
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, 1) void gemm_wgmma(const __grid_constant__ GroupedGemm gemm) {
  WgmmaKernel<Code, Tile, kGateUp>::run(gemm);
}
