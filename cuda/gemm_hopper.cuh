// Grouped GEMM of compute capability 9.0: one warp copies words, two gather tokens, two warpgroups decode and multiply;
// only barriers of the stages connect them.  Weights are the A operand, in registers; tokens are the B operand.
//
// With many tokens wgmma multiplies, reading tokens from shared memory.  With few, decoding is what takes time, and
// mma.sync lets it run on where wgmma's registers would have to be waited for.
#pragma once
#define PM_HOPPER
#include "grouped.cuh"

template <bool kWgmma_, int kPartTokens_, int kWidthStep_, int kMaxSplits_, int kBlocks_>
struct HopperTile {
  static constexpr bool kWgmma = kWgmma_;           // else mma.sync
  static constexpr int kPartTokens = kPartTokens_;  // tokens of each of the two parts
  static constexpr int kWidthStep = kWidthStep_;    // widths that products come in, up to kPartTokens
  static constexpr int kMaxSplits = kMaxSplits_;    // of an item's depth, among blocks
  static constexpr int kBlocks = kBlocks_;          // that share a multiprocessor, 1 or 2
  // Of a thread that copies and of one that multiplies; together what the compiler gives all threads alike.
  static constexpr int kCopyRegisters = kBlocks == 1 ? 72 : 40, kMultiplyRegisters = kBlocks == 1 ? 216 : 96;
  static constexpr int kConsumers = 2;  // warpgroups that multiply, 64 rows each
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kStrips = 4 * kConsumers;
  static constexpr int kTokens = 2 * kPartTokens;
  static constexpr int kDepth = 64;  // columns per stage: 128 bytes of a token, one swizzle row
  static constexpr int kDepthTiles = kDepth / 16;
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
};

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

  // The launch's work: items times splits, and which tiles of the depth a split has.
  struct Launch {
    int first_group, row_tiles, splits, units;

    __device__ explicit Launch(const GroupedGemm& gemm) {
      row_tiles = (gemm.rows / 16 + Tile::kStrips - 1) / Tile::kStrips;
      first_group = gemm.first_group ? uniform(*gemm.first_group) : 0;
      const int items = (uniform(*gemm.end_group) - first_group) * row_tiles;
      splits = Tile::kMaxSplits > 1 ? choose_splits(items, stages(gemm), gridDim.x, Tile::kMaxSplits) : 1;
      units = items * splits;
    }
    __device__ WorkItem work(const GroupedGemm& gemm, int unit) const {
      return WorkItem(gemm, first_group, unit / splits, row_tiles);
    }
    __device__ static int stages(const GroupedGemm& gemm) {
      return (gemm.depth / 16 + Tile::kDepthTiles - 1) / Tile::kDepthTiles;
    }
    __device__ int first_tile(const GroupedGemm& gemm, int unit) const {
      return stages(gemm) * (unit % splits) / splits * Tile::kDepthTiles;
    }
    __device__ int end_tile(const GroupedGemm& gemm, int unit) const {
      return min(stages(gemm) * (unit % splits + 1) / splits * Tile::kDepthTiles, gemm.depth / 16);
    }
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

  // A block's first unit.  Blocks 2i and 2i + 1 tend to share a multiprocessor: not both shall have a unit more than
  // the others.
  __device__ static int first_unit() {
    if (gridDim.x % Tile::kBlocks) return blockIdx.x;
    return blockIdx.x % Tile::kBlocks * (gridDim.x / Tile::kBlocks) + blockIdx.x / Tile::kBlocks;
  }

  static constexpr int kTokenThreads = 64;

  struct Slot {
    int index = 0, parity = 0;
    __device__ void next() {
      if (++index == kStages) index = 0, parity ^= 1;
    }
  };

  // One warp: a bulk copy per strip and stage, and one per group of steps.  Reads nothing that the kernel before
  // writes, so that the first words of the down projection arrive while gate and up still run elsewhere.
  __device__ static void copy_words(const GroupedGemm& gemm, const Pipeline& pipeline, const Launch& launch) {
    const int lane = threadIdx.x % 32;
    Slot slot;
    for (int unit = first_unit(); unit < launch.units; unit += gridDim.x) {
      const WorkItem work = launch.work(gemm, unit);
      const int end = launch.end_tile(gemm, unit);
      const int strips = min(Tile::kStrips, gemm.rows / 16 - work.row_tile * Tile::kStrips);
      const uint8_t* weights = unit_weights<Code>(gemm, work.group.unit) +
                               int64_t(work.row_tile * Tile::kStrips + lane) * (gemm.depth / 16) * Code::kTileBytes;
      for (int tile = launch.first_tile(gemm, unit); tile < end; tile += Tile::kDepthTiles, slot.next()) {
        const int tiles = min(Tile::kDepthTiles, end - tile), bytes = tiles * Code::kTileBytes;
        const int groups = Code::kHasSteps ? max(tiles >> gemm.group_shift, 1) : 0;
        const uint32_t full = pipeline.full(slot.index);
        barrier_wait(pipeline.empty(slot.index), slot.parity ^ 1);
        if (lane == 0) barrier_arrive_expect(full, strips * (bytes + groups * kStripStepBytes));
        __syncwarp();  // the bytes are expected before the first of them can arrive
        if (lane < strips)
          bulk_copy(pipeline.stage(slot.index) + Tile::kTokenBytes + lane * kStripBytes,
                    weights + tile * Code::kTileBytes, bytes, full);
        if (Code::kHasSteps && lane < groups)
          bulk_copy(shared_address(pipeline.steps(slot.index)) + lane * kGroupBytes,
                    strip_steps(gemm, work.group.unit, tile + (lane << gemm.group_shift),
                                work.row_tile * Tile::kStrips),
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
    for (int unit = first_unit(); unit < launch.units; unit += gridDim.x) {
      const WorkItem work = launch.work(gemm, unit);
      const int end = launch.end_tile(gemm, unit);
      uint32_t places[kTokensPerThread];  // in 16-byte vectors, so that 32 bits hold any
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int row = work.group.sorted_row(i * 8 / Tile::kPartTokens, i * 8 % Tile::kPartTokens + first);
        places[i] = row >= 0 ? activation_row<kGateUp>(gemm, row) * row_vectors : kNone;
      }
      for (int tile = launch.first_tile(gemm, unit); tile < end; tile += Tile::kDepthTiles, slot.next()) {
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
  __device__ __forceinline__ static void consume(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                 const Launch& launch, int unit, const WorkItem& work, Slot& slot) {
    const bool dense = work.dense(gemm);
    float sums0[kColumns0 / 8][4] = {}, sums1[kColumns1 / 8 + (kColumns1 == 0)][4] = {};
    const uint32_t table = shared_address(pipeline.table()) + threadIdx.x % 32 * 4;
    const Code code(dense, work.position(0), work.position(1), table);
    const int depth_tiles = launch.end_tile(gemm, unit) - launch.first_tile(gemm, unit);
    if constexpr (Tile::kWgmma)
      multiply_wgmma<kColumns0, kColumns1>(depth_tiles, gemm.group_shift, pipeline, slot, code, sums0, sums1);
    else
      multiply_mma<kColumns0, kColumns1>(depth_tiles, gemm.group_shift, pipeline, slot, code, sums0, sums1);

    if (launch.splits > 1) {
      leave_partial(gemm, unit, 0, sums0);
      if (kColumns1 > 0) leave_partial(gemm, unit, kColumns0 / 8, sums1);
      if (!is_last(gemm, pipeline, launch.splits, unit)) return;
      sum_partials(gemm, launch.splits, unit, 0, sums0);
      if (kColumns1 > 0) sum_partials(gemm, launch.splits, unit, kColumns0 / 8, sums1);
    }
    store(gemm, pipeline, work, 0, Code::scale(dense), sums0);
    if constexpr (kColumns1 > 0) store(gemm, pipeline, work, 1, Code::scale(dense), sums1);
  }

  // Stores a warpgroup's sums of one part, 32 tokens at a time, through shared memory: there its four warps' rows meet
  // and leave as whole lines of a token.
  template <int kTiles>
  __device__ __forceinline__ static void store(const GroupedGemm& gemm, const Pipeline& pipeline, const WorkItem& work,
                                               int part, float scale, const float (&sums)[kTiles][4]) {
    constexpr int kStripBytesOut = kGateUp ? 16 : 32;  // of a token, from one strip
    constexpr int kVectors = 4 * kStripBytesOut / 16, kTokensPerPass = 128 / kVectors;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    uint8_t* staging = pipeline.staging(group);
    const int width = kGateUp ? gemm.rows / 2 : gemm.rows;
    const int vector = threadIdx.x % kVectors, token = threadIdx.x % 128 / kVectors;
    const int strip = work.row_tile * Tile::kStrips + group * 4 + vector * 16 / kStripBytesOut;
    __nv_bfloat16* out = gemm.out + (work.row_tile * Tile::kStrips + group * 4) * (kStripBytesOut / 2) + vector * 8;
    const int count = uniform(work.group.count[part]);

#pragma unroll
    for (int first = 0; first < kTiles; first += 4) {
      if (first * 8 >= count) break;
      auto tile = [&](int t, int lower) {  // a lane's share of an 8 x 8 matrix; nothing beyond the last tile
        if (first + t >= kTiles) return 0u;
        const float(&sum)[4] = sums[first + t < kTiles ? first + t : 0];
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
        const int sorted_row = work.group.sorted_row(part, first * 8 + at);
        if (sorted_row < 0 || strip >= gemm.rows / 16) continue;
        const int64_t place = kGateUp ? sorted_row : gemm.sorted_slots[sorted_row];
        *reinterpret_cast<uint4*>(out + place * width) =
            *reinterpret_cast<const uint4*>(staging + at * kStagingPitch + vector * 16);
      }
      warpgroup_barrier(1 + group);
    }
  }

  // The warp's tile of the slot's stage, and one lane's steps.
  __device__ static const uint8_t* tile_at(const Pipeline& pipeline, const Slot& slot, int tile) {
    return pipeline.stages + slot.index * kStageBytes + Tile::kTokenBytes + threadIdx.x / 32 * kStripBytes +
           tile * Code::kTileBytes;
  }
  // One lane's steps of the stage's first two tiles, and of its others.
  struct Steps {
    uint32_t first = 0, second = 0;
    __device__ Steps(const Pipeline& pipeline, const Slot& slot, int group_shift) {
      if constexpr (!Code::kHasSteps) return;
      static_assert(Tile::kDepthTiles == 2 * kMinGroupTiles);
      const uint8_t* strip = pipeline.steps(slot.index) + threadIdx.x / 32 * kStripStepBytes + threadIdx.x % 32 / 4 * 4;
      first = *reinterpret_cast<const uint32_t*>(strip);
      second = *reinterpret_cast<const uint32_t*>(strip + (kMinGroupTiles >> group_shift) * kGroupBytes);
    }
    __device__ uint32_t of(int tile) const { return tile < kMinGroupTiles ? first : second; }
  };

  template <int kTiles>
  __device__ static void set_zero(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0;
  }

  // The stages of one split for one warpgroup, by mma.sync.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void multiply_mma(int depth_tiles, int group_shift, const Pipeline& pipeline,
                                                      Slot& slot, const Code& code, float (&sums0)[kColumns0 / 8][4],
                                                      float (&sums1)[kColumns1 / 8 + (kColumns1 == 0)][4]) {
    constexpr int kTiles0 = kColumns0 / 8, kTiles = kTiles0 + kColumns1 / 8, kLoads = (kTiles + 1) / 2;
    const int lane = threadIdx.x % 32;
    // A load brings 16 columns of the depth for two tiles of tokens; lanes 16 and up give the addresses of the second.
    uint32_t rows[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int tile = min(2 * i + lane / 16, kTiles - 1);
      rows[i] = ((tile < kTiles0 ? 0 : Tile::kPartTokens - kColumns0) + tile * 8 + lane % 8) * 128;
    }
    const uint32_t swizzled = (lane / 8 % 2 ^ lane % 8) * 16;
    // Sums of both parts' tiles in one array; with steps also the products of one group, which the step then
    // multiplies: a few tokens take fewer multiplications so than the weights would.
    float sums[kTiles][4] = {}, products[kTiles][4];
    auto multiply_tile = [&](int t, float(&into)[kTiles][4]) __attribute__((always_inline)) {
      uint32_t b[kLoads][4], a0[4], a1[4];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) ldmatrix_x4(b[i], pipeline.stage(slot.index) + (rows[i] + (swizzled ^ t * 32)));
      code.template decode<(kColumns1 > 0)>(code.load(tile_at(pipeline, slot, t), lane), a0, a1);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        mma_m16n8k16(into[j], j < kTiles0 ? a0 : a1, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    };
    auto add_products = [&](uint32_t steps) __attribute__((always_inline)) {
      const float upper = __uint_as_float(steps << 16), lower = __uint_as_float(steps & 0xFFFF0000u);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        sums[j][0] += upper * products[j][0], sums[j][1] += upper * products[j][1];
        sums[j][2] += lower * products[j][2], sums[j][3] += lower * products[j][3];
        products[j][0] = products[j][1] = products[j][2] = products[j][3] = 0;
      }
    };
    if constexpr (Code::kHasSteps) set_zero(products);
    const bool stage_has_one_step = !Code::kHasSteps || 1 << group_shift >= Tile::kDepthTiles;
    for (int left = depth_tiles; left > 0; left -= Tile::kDepthTiles, slot.next()) {
      barrier_wait(pipeline.full(slot.index), slot.parity);
      const Steps steps(pipeline, slot, group_shift);
      float(&into)[kTiles][4] = Code::kHasSteps ? products : sums;
      if (left >= Tile::kDepthTiles && stage_has_one_step) {
#pragma unroll
        for (int t = 0; t < Tile::kDepthTiles; ++t) multiply_tile(t, into);
        if constexpr (Code::kHasSteps) add_products(steps.first);
      } else {
#pragma unroll 1
        for (int t = 0; t < min(left, Tile::kDepthTiles); ++t) {
          multiply_tile(t, into);
          if constexpr (Code::kHasSteps) add_products(steps.of(t));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(pipeline.empty(slot.index));
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float(&sum)[4] = j < kTiles0 ? sums0[j < kTiles0 ? j : 0] : sums1[j < kTiles0 ? 0 : j - kTiles0];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = sums[j][i];
    }
  }

  // The same by wgmma.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void multiply_wgmma(int depth_tiles, int group_shift, const Pipeline& pipeline,
                                                        Slot& slot, const Code& code, float (&sums0)[kColumns0 / 8][4],
                                                        float (&sums1)[kColumns1 / 8 + (kColumns1 == 0)][4]) {
    using Words = typename Code::Words;
    const int lane = threadIdx.x % 32;
    auto multiply_tile = [&](const Words& words, uint32_t steps, int tile) __attribute__((always_inline)) {
      uint32_t a0[4], a1[4];
      code.template decode<(kColumns1 > 0)>(words, a0, a1);
      if constexpr (Code::kHasSteps) {
        multiply_by_steps(a0, steps);
        if constexpr (kColumns1 > 0) multiply_by_steps(a1, steps);
      }
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
      const Steps steps(pipeline, slot, group_shift);
      Words words[Tile::kDepthTiles];
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) words[t] = code.load(tile_at(pipeline, slot, t), lane);
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
      const Steps steps(pipeline, slot, group_shift);
#pragma unroll 1
      for (int t = 0; t < rest; ++t) {
        multiply_tile(code.load(tile_at(pipeline, slot, t), lane), steps.of(t), t);
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
  __device__ static void leave_partial(const GroupedGemm& gemm, int unit, int first_tile,
                                       const float (&sums)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      __stcg(partial(gemm, unit, first_tile + j), make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
  }

  // Whether all splits of the unit's item are there for this warpgroup's rows.
  __device__ static bool is_last(const GroupedGemm& gemm, const Pipeline& pipeline, int splits, int unit) {
    const int group = threadIdx.x / 128;
    int* earlier = reinterpret_cast<int*>(pipeline.staging(group));
    __threadfence();
    warpgroup_barrier(1 + group);
    int* arrivals = gemm.arrivals + unit / splits * Tile::kConsumers + group;
    if (threadIdx.x % 128 == 0) {
      *earlier = atomicAdd(arrivals, 1);
      if (*earlier == splits - 1) *arrivals = 0;  // for the next launch
    }
    warpgroup_barrier(1 + group);
    const bool last = uniform(*earlier) == splits - 1;
    warpgroup_barrier(1 + group);  // the staging is free again
    __threadfence();
    return last;
  }

  // The sum over the splits of the unit's item in their order, whichever came last.
  template <int kTiles>
  __device__ static void sum_partials(const GroupedGemm& gemm, int splits, int unit, int first_tile,
                                      float (&sums)[kTiles][4]) {
    const int first = unit / splits * splits;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float4 sum = __ldcg(partial(gemm, first, first_tile + j));
      for (int split = 1; split < splits; ++split) {
        const float4 other = __ldcg(partial(gemm, first + split, first_tile + j));
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
      }
      sums[j][0] = sum.x, sums[j][1] = sum.y, sums[j][2] = sum.z, sums[j][3] = sum.w;
    }
  }

  // Calls consume with the narrowest products that hold the parts' tokens.  Their widths have to be known at compile
  // time, and deciding outside the loop over the stages leaves nothing in it that the compiler takes for divergence.
  template <int kColumns0, int kColumns1>
  __device__ __forceinline__ static void consume_columns(const GroupedGemm& gemm, const Pipeline& pipeline,
                                                         const Launch& launch, int unit, const WorkItem& work,
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
                                                     const Launch& launch) {
    Slot slot;
    for (int unit = first_unit(); unit < launch.units; unit += gridDim.x) {
      const WorkItem work = launch.work(gemm, unit);
      consume_columns<Tile::kWidthStep, 0>(gemm, pipeline, launch, unit, work, uniform(work.group.count[0]),
                                           uniform(work.group.count[1]), slot);
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
