// The stages of an item or piece multiplied with wgmma, which takes decoded words from registers and tokens from shared
// memory.
#pragma once
#include "sums.cuh"
#include "wgmma.cuh"

template <class Code, class Tile, bool kGateUp>
struct WgmmaMainloop {
  using Stage = Stages<Code, Tile, kGateUp>;
  using Slot = typename Stage::Slot;

  // For one warpgroup: kTiles0 tiles of tokens of part 0, kTiles1 of part 1.  kOnePosition: that of both parts.
  template <int kTiles0, int kTiles1, bool kOnePosition>
  __device__ __forceinline__ static void multiply(int depth_tiles, int group_shift, Slot& slot, const Code& code,
                                                  float (&sums)[kTiles0 + kTiles1][4]) {
    float (&sums0)[kTiles0][4] = reinterpret_cast<float (&)[kTiles0][4]>(sums[0]);
    float (&sums1)[kTiles1 + (kTiles1 == 0)][4] =
        reinterpret_cast<float (&)[kTiles1 + (kTiles1 == 0)][4]>(sums[kTiles1 ? kTiles0 : 0]);
    using Words = typename Code::Words;
    constexpr bool kTwo = kTiles1 > 0 && !kOnePosition;
    constexpr int kPositions = kTwo || !Code::kPositionsCost ? 2 : 1;
    const int lane = kept(threadIdx.x % 32);
    // Of a tile whose products are in flight, and of the one after it.
    uint32_t operands[2][kPositions][4];
    auto multiply_tile = [&](const Words& words, uint32_t steps, int tile,
                             auto& operand) __attribute__((always_inline)) {
      uint32_t (&a0)[4] = operand[0], (&a1)[4] = operand[kPositions - 1];
      code.template take_apart<kTwo>(code.look_up(words), a0, a1);
      if constexpr (Code::kHasSteps) {
        multiply_by_steps(a0, steps);
        if constexpr (kTwo) multiply_by_steps(a1, steps);
      }
      // In units of 16 bytes.
      const uint32_t tokens = (Stage::stage(0) + tile * 32) / 16 + slot.index * (Stage::kStageBytes / 16);
      wgmma_fence();
      wgmma_m64k16<8 * kTiles0>(sums0, a0, wgmma_descriptor(tokens));
      if constexpr (kTiles1 > 0) wgmma_m64k16<8 * kTiles1>(sums1, a1, wgmma_descriptor(tokens + Tile::kPartTokens * 8));
      wgmma_commit();
    };
    const typename Stage::Steps own_steps(group_shift);
    const uint32_t own_tiles = kept(Stage::tile_at(Slot(), 0, Tile::kDepthTiles));  // of whole stages, in slot 0
    int finished = -1;  // slot whose products are still in flight
    auto release = [&] {
      if (lane == 0 && finished >= 0) barrier_arrive(Stage::empty(finished));
    };

    // One tile is always being multiplied while the next is decoded, also from one stage to the next.
    for (int whole = depth_tiles / Tile::kDepthTiles; whole > 0; --whole) {
      barrier_wait(Stage::full(slot.index), slot.parity);
      if constexpr (Tile::kFenceLag == 0) fence_async_proxy();
      const auto steps = own_steps.of(slot);
      const uint32_t tiles = own_tiles + slot.index * Stage::kStageBytes;
      Words words = code.load(tiles, lane, false);
#pragma unroll
      for (int t = 0; t < Tile::kDepthTiles; ++t) {
        const Words now = words;
        if (t + 1 < Tile::kDepthTiles) words = code.load(tiles + (t + 1) * Code::kTileBytes, lane, t % 2 == 0);
        multiply_tile(now, steps.of(t), t, operands[t % 2]);
        wgmma_wait<1>();
        if (t > 0) read_until_here(operands[(t + 1) % 2]);
        if (t == 0) release();
      }
      finished = slot.index;
      slot.next();
    }
    wgmma_wait<0>();
    complete_here(sums);
    read_until_here(operands[1]);
    release();
    if (const int rest = depth_tiles % Tile::kDepthTiles) {
      barrier_wait(Stage::full(slot.index), slot.parity);
      if constexpr (Tile::kFenceLag == 0) fence_async_proxy();
      const auto steps = own_steps.of(slot);
#pragma unroll 1
      for (int t = 0; t < rest; ++t) {
        multiply_tile(code.load(Stage::tile_at(slot, t, rest), lane, t % 2), steps.of(t), t, operands[0]);
        wgmma_wait<0>();
        complete_here(sums);
        read_until_here(operands[0]);
      }
      finished = slot.index;
      release();
      slot.next();
    }
  }

 private:
  // After a wait, of the products that it waited for: their operands were read up to it, and their sums change no more.
  // To the compiler, the instruction that only starts products had done both.  ptxas, which chooses the registers, does
  // not see this: check.py reads what it made.
  template <int kPositions>
  __device__ __forceinline__ static void read_until_here(uint32_t (&operand)[kPositions][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kPositions; ++i) changes_here(operand[i / 4][i % 4]);
  }
  template <int kTiles>
  __device__ __forceinline__ static void complete_here(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) changes_here(sums[i / 4][i % 4]);
  }
};
