// The stages of an item multiplied in e4m3 with wgmma: decoded words from registers, quantised tokens from shared
// memory.
//
// Rows of the sums are rows of the weights, so a step belongs to rows.  The sums are kept in units of the step of the
// group that is being multiplied: between two groups they are multiplied by the quotient of their steps, and in the end
// by the last step.
#pragma once
#include "stages_fp8.cuh"
#include "wgmma.cuh"

// The steps of a lane's two rows, as they come.
class StepQuotients {
 public:
  // What the sums of both rows are multiplied by before the products of a group with these steps are added.
  __device__ float2 next(uint32_t steps) {
    const float2 before = last_;
    last_ = {large_enough(__low2float(as_bf16x2(steps)), before.x),
             large_enough(__high2float(as_bf16x2(steps)), before.y)};
    return {__fdividef(before.x, last_.x), __fdividef(before.y, last_.y)};
  }
  __device__ float2 last() const { return last_; }

 private:
  // A step of zero would leave nothing of the sums before it.  One that is smaller than the last by this much adds
  // nothing to them that 14 bits of mantissa, which the products are summed in, could hold.
  static constexpr float kSmallestQuotient = 0x1p-24f, kSmallest = 0x1p-100f;

  __device__ static float large_enough(float step, float last) {
    const float least = fmaxf(fabsf(last) * kSmallestQuotient, kSmallest);
    return fabsf(step) < least ? least : step;
  }

  float2 last_ = {0, 0};
};

// kTiles: of eight tokens; kGroups: step groups of a stage.
template <class Code, int kTiles, int kGroups>
struct Fp8Mainloop {
  using Stage = Fp8Stages<Code>;
  using Slot = typename Stage::Slot;
  static constexpr int kProducts = kFp8Depth / 32;  // of a stage, 32 columns each
  using Sums = float[kTiles][4];

  // What a lane holds of a stage while it is multiplied.
  struct Operands {
    uint32_t weights[kProducts][4];
    uint32_t steps[kGroups];
  };

  // Multiplies an item's stages.  Its last one is not released: the epilogue still reads what came with it.
  __device__ __forceinline__ static void multiply(const Items<Fp8Tile>& items, Slot& slot, const Code& code, Sums& sums,
                                                  StepQuotients& steps) {
    constexpr int kTilesOfStage = Fp8Tile::kDepthTiles;
    Operands even, odd;  // two, since those of the next stage are decoded while products read the last one's
    int left = items.gemm.depth / 16;  // tiles of the depth from `slot` on
    take_stage(slot, code, left, even);
    auto multiply_and_take = [&](Operands& operands, Operands& next) __attribute__((always_inline)) {
      Slot following = slot;
      following.next();
      multiply_stage(slot, operands, steps, sums,
                     [&]() __attribute__((always_inline)) { take_stage(following, code, left - kTilesOfStage, next); });
      if (threadIdx.x % 32 == 0) barrier_arrive(Stage::empty(slot.index));
      slot = following;
      left -= kTilesOfStage;
    };
    while (left > 2 * kTilesOfStage) {
      multiply_and_take(even, odd);
      multiply_and_take(odd, even);
    }
    if (left > kTilesOfStage) {
      multiply_and_take(even, odd);
      multiply_stage(slot, odd, steps, sums, [] {});
    } else {
      multiply_stage(slot, even, steps, sums, [] {});
    }
  }

 private:
  // Waits for a stage with `left` tiles of the item's depth in it and behind it, and decodes its words.
  __device__ __forceinline__ static void take_stage(const Slot& slot, const Code& code, int left, Operands& operands) {
    const int lane = threadIdx.x % 32;
    barrier_wait(Stage::full(slot.index), slot.parity);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint32_t tiles = Stage::tiles_at(slot, block, left);
#pragma unroll
      for (int t = 0; t < kBlockTiles; ++t) {
        uint32_t (&registers)[4] = operands.weights[block * 2 + t / 2];
        code.weights(Code::load(tiles + t * Code::kTileBytes, lane), registers[t % 2 * 2], registers[t % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g)  // a group beyond the depth has no steps: its weights multiply zeros
      operands.steps[g] = g == 0 || left > g * (Fp8Tile::kDepthTiles / kGroups) ? Stage::own_steps(slot, g)
                                                                                : operands.steps[g - (g > 0)];
  }

  // meanwhile: called once, while products are in flight.
  template <class Meanwhile>
  __device__ __forceinline__ static void multiply_stage(const Slot& slot, Operands& operands, StepQuotients& steps,
                                                        Sums& sums, Meanwhile meanwhile) {
    const uint32_t tokens = (Stage::stage(0) + slot.index * Stage::kStageBytes) / 16;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float2 quotients = steps.next(operands.steps[g]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        sums[j][0] *= quotients.x, sums[j][1] *= quotients.x;
        sums[j][2] *= quotients.y, sums[j][3] *= quotients.y;
      }
      wgmma_fence();
#pragma unroll
      for (int i = g * (kProducts / kGroups); i < (g + 1) * (kProducts / kGroups); ++i)
        wgmma_m64k32_e4m3<8 * kTiles>(sums, operands.weights[i], wgmma_descriptor(tokens + i * 2));
      wgmma_commit();
      if (g == 0) {
        wgmma_wait<1>();
        meanwhile();
      }
      wgmma_wait<0>();
      complete_here(sums);
    }
    read_until_here(operands);
  }

  // After the wait: the products' operands were read up to it, and their sums change no more.  To the compiler, the
  // instruction that only starts a product had done both.
  __device__ __forceinline__ static void complete_here(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
  }
  __device__ __forceinline__ static void read_until_here(Operands& operands) {
#pragma unroll
    for (int i = 0; i < 4 * kProducts; ++i) asm volatile("" : "+r"(operands.weights[i / 4][i % 4])::"memory");
  }
};
