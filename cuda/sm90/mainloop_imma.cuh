// The stages of an item or piece of trellis words multiplied with mma.sync on integers, for few tokens.  A state's
// weights are sums over four bytes: here the product sums them, which leaves one instruction a state and position to
// decoding.
#pragma once
#include "sums.cuh"

template <class Code, class Tile, bool kGateUp>
struct ImmaMainloop {
  using Stage = Stages<Code, Tile, kGateUp>;
  using Slot = typename Stage::Slot;
  using Tokens = Int8Tokens<Tile>;
  static constexpr int kStrips = Tile::kStripsPerWarp, kPartFours = Tile::kPartTokens / 4;

  // For one warp: kFours0 times four tokens of part 0, kFours1 of part 1.  kOnePosition: both parts have position0.
  // Else part 1, if there is one, has position 1, and part 0 then has position 0.
  template <int kFours0, int kFours1, bool kOnePosition>
  __device__ __forceinline__ static void multiply(int depth_tiles, int group_shift, Slot& slot, int position0,
                                                  typename ItemSums<Tile>::Sums& all_sums) {
    constexpr int kFours = kFours0 + kFours1;
    constexpr bool kTwo = kFours1 > 0 && !kOnePosition;
    const typename Code::Bytes first(kTwo ? 0 : position0), second(1);
    const float unit = !kTwo && position0 ? 0.125f : 1.0f;
    const int lane = kept(threadIdx.x % 32);
    const uint32_t places[2] = {kept(Tokens::place(lane, 0)), kept(Tokens::place(lane, 1))};
    auto four = [](int j) { return j < kFours0 ? j : kPartFours + j - kFours0; };
    int products[kStrips][kFours][4];
    float sums[kStrips][kFours][2] = {};

    // An even tile and the odd one after it: where the tokens of 16 columns and the words of the first strip are.
    auto multiply_two = [&](uint32_t tokens, uint32_t tile, bool first_of_products) __attribute__((always_inline)) {
      typename Code::Words words[kStrips][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
        Code::load_two(tile + s * 4 * Tile::kConsumers * Stage::kStripBytes, lane, words[s]);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        uint4 b[kFours];
#pragma unroll
        for (int j = 0; j < kFours; ++j)
          b[j] = load_shared_16(tokens + places[t] + (t * Tokens::kTileBytes + four(j) * Tokens::kFourBytes));
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          const auto states = Code::look_up(words[s][t]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t a0[4], a1[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              // Registers of A: the rows of one column, then of the next.
              const uint32_t x = Code::multiplied(states.of[half * 4 + i % 2 * 2 + i / 2]);
              a0[i] = first.of(x);
              if (kTwo) a1[i] = second.of(x);
            }
#pragma unroll
            for (int j = 0; j < kFours; ++j) {
              int (&sum)[4] = products[s][j];
              if (first_of_products && t == 0 && half == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
              mma_m16n8k32(sum, kTwo && j >= kFours0 ? a1 : a0, half ? b[j].z : b[j].x, half ? b[j].w : b[j].y, sum);
            }
          }
        }
      }
    };
    // half: of the stage, 2: all of it.
    auto add_products = [&](uint32_t stage, int half, const uint32_t (&steps)[kStrips]) __attribute__((always_inline)) {
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        auto scale = Tokens::scale(stage, four(j), lane);
        scale.scale *= kTwo && j >= kFours0 ? 0.125f : unit;
        const float excess = half == 2 ? scale.excess : half ? scale.right : scale.left;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          const int (&product)[4] = products[s][j];
          const float upper = __uint_as_float(steps[s] << 16), lower = __uint_as_float(steps[s] & 0xFFFF0000u);
          sums[s][j][0] += upper * (scale.scale * float(256 * product[0] + product[1]) - excess);
          sums[s][j][1] += lower * (scale.scale * float(256 * product[2] + product[3]) - excess);
        }
      }
    };

    const typename Stage::Steps own_steps(group_shift);
    const uint32_t own_tiles = kept(Stage::tile_at(Slot(), 0, Tile::kDepthTiles));  // of whole stages, in slot 0
    const bool stage_has_one_step = 1 << group_shift >= Tile::kDepthTiles;
    for (int left = depth_tiles; left > 0; left -= Tile::kDepthTiles, slot.next()) {
      barrier_wait(Stage::full(slot.index), slot.parity);
      const uint32_t stage = Stage::stage(slot.index);
      typename Stage::Steps::OfStage steps[kStrips];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) steps[s] = own_steps.of(slot, s);
      if (left >= Tile::kDepthTiles && stage_has_one_step) {
#pragma unroll
        for (int t = 0; t < Tile::kDepthTiles; t += 2)
          multiply_two(stage + t * Tokens::kTileBytes,
                       own_tiles + slot.index * Stage::kStageBytes + t * Code::kTileBytes, t == 0);
        uint32_t all[kStrips];
#pragma unroll
        for (int s = 0; s < kStrips; ++s) all[s] = steps[s].first;
        add_products(stage, 2, all);
      } else {
        const int tiles = min(left, Tile::kDepthTiles);
#pragma unroll 1
        for (int t = 0; t < tiles; t += 2) {
          multiply_two(stage + t * Tokens::kTileBytes, Stage::tile_at(slot, t, tiles), true);
          uint32_t own[kStrips];
#pragma unroll
          for (int s = 0; s < kStrips; ++s) own[s] = steps[s].of(t);
          add_products(stage, t / 2, own);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(Stage::empty(slot.index));
    }

    // Four tokens have every second column of a tile.
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int j = 0; j < 2 * kPartFours; ++j) {
        const int own = j < kPartFours ? j : kFours0 + j - kPartFours;
        const bool has = j < kPartFours ? j < kFours0 : j - kPartFours < kFours1;
#pragma unroll
        for (int row = 0; row < 2; ++row)
          all_sums[s][j / 2][row * 2 + j % 2] = has ? sums[s][has ? own : 0][row] : 0;
      }
  }
};
