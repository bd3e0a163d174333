// The stages of an item or piece multiplied with mma.sync, for few tokens: decoding runs on where wgmma's registers
// would have to be waited for, and up to 16 tokens of a pair are multiplied without taking the pair's words apart by
// position.
#pragma once
#include "sums.cuh"

// What multiplies a strip's tile by the tokens of a stage with mma.sync.  take() gets them for 16 columns of the
// depth, multiply() adds their products.
//
// Tiles of part 0 by the weights of its position, then tiles of part 1 by those of its.
// kOnePosition: that of both.
template <class Code, class Tile, int kTiles0, int kTiles1, bool kOnePosition>
struct PartProduct {
  static constexpr int kTiles = kTiles0 + kTiles1;
  struct Tokens {
    uint32_t values[(kTiles + 1) / 2][4];
    __device__ uint32_t value(int tile, int half) const { return values[tile / 2][tile % 2 * 2 + half]; }
  };

  __device__ static int row_tile(int tile) { return ItemSums<Tile>::template place<kTiles0>(tile); }

  __device__ void take(Tokens& tokens, int load, const uint32_t (&two_tiles)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) tokens.values[load][i] = two_tiles[i];
  }

  __device__ void multiply(const Code& code, const typename Code::Entries& entries, const Tokens& tokens,
                           float (&into)[kTiles][4]) const {
    uint32_t a0[4], a1[4];
    code.template take_apart<(kTiles1 > 0 && !kOnePosition)>(entries, a0, a1);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      mma_m16n8k16(into[j], j < kTiles0 || kOnePosition ? a0 : a1, tokens.value(j, 0), tokens.value(j, 1));
  }
};

// A pair word's two weights go into the product side by side, as two columns of the depth; a token has its value in
// the one of its expert and zero in the other.  So words need not be taken apart by position, and tokens of both
// experts share a tile; but every token costs instructions.
template <class Code, int kTiles_>
struct JoinedProduct {
  static constexpr int kTiles = kTiles_;
  struct Tokens {
    uint32_t values[(kTiles + 1) / 2][4], joined[kTiles][4];
    __device__ uint32_t value(int tile, int half) const { return values[tile / 2][tile % 2 * 2 + half]; }
  };
  // Byte selectors that put the lower or the upper of two values where the token's expert has its weights.  For codes
  // whose decoding keeps that pipe busy the upper value goes there by products with one and zero.
  uint32_t lower[kTiles], upper[kTiles];

  __device__ explicit JoinedProduct(const TokenGroup& group) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const bool second = group.joined_position(j * 8 + threadIdx.x % 32 / 4);
      lower[j] = second ? 0x1044 : 0x4410;
      if constexpr (Code::kPositionsCost) upper[j] = second ? 0x3F800000 : 0x3F80;
      else upper[j] = second ? 0x3244 : 0x4432;
    }
  }

  __device__ static int row_tile(int tile) { return tile; }

  __device__ void take(Tokens& tokens, int load, const uint32_t (&two_tiles)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tokens.values[load][i] = two_tiles[i];
      const int tile = 2 * load + i / 2;
      if (tile >= kTiles) continue;
      tokens.joined[tile][i % 2 * 2] = __byte_perm(two_tiles[i], 0, lower[tile]);
      tokens.joined[tile][i % 2 * 2 + 1] =
          Code::kPositionsCost ? multiply_bf16x2(upper[tile], __high2bfloat162(as_bf16x2(two_tiles[i])))
                               : __byte_perm(two_tiles[i], 0, upper[tile]);
    }
  }

  __device__ void multiply(const Code& code, const typename Code::Entries& entries, const Tokens& tokens,
                           float (&into)[kTiles][4]) const {
    uint32_t pairs[8];
    take_pairs(code, entries, pairs);
    uint32_t a[2][4] = {{pairs[0], pairs[2], pairs[1], pairs[3]}, {pairs[4], pairs[6], pairs[5], pairs[7]}};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      mma_m16n8k16(into[j], a[0], tokens.joined[j][0], tokens.joined[j][1]);
      mma_m16n8k16(into[j], a[1], tokens.joined[j][2], tokens.joined[j][3]);
    }
  }
};

template <class Code, class Tile, bool kGateUp>
struct MmaMainloop {
  using Stage = Stages<Code, Tile, kGateUp>;
  using Slot = typename Stage::Slot;

  // The stages of an item or piece for one warp.
  template <class Product, int kTiles = Product::kTiles>
  __device__ __forceinline__ static void multiply(int depth_tiles, int group_shift, const Product product, Slot& slot,
                                                  const Code& code, float (&sums)[kTiles][4]) {
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
    // Less raised.  There are tiles: to the compiler these are four values, which it keeps side by side.
    uint32_t lowered[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) lowered[i] = Code::kRaised ^ 0x80008000 ^ (depth_tiles + i) >> 31;
    float products[kTiles][4] = {};  // of a group, if they are kept
    auto multiply_tile = [&](int t, uint32_t tile) __attribute__((always_inline)) {
      typename Product::Tokens tokens;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t two_tiles[4];
        ldmatrix_x4(two_tiles, Stage::stage(slot.index) + (rows[i] + (swizzled ^ t * 32)));
        product.take(tokens, i, two_tiles);
      }
      const auto entries = code.look_up(code.load(tile, lane, t % 2));
      product.multiply(code, entries, tokens, kKeepsProducts ? products : sums);
      if constexpr (Code::kRaised != 0) {
        // One product a token tile subtracts what all weights of the strip have too much.
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          mma_m16n8k16(kKeepsProducts ? products[j] : sums[j], lowered, tokens.value(j, 0), tokens.value(j, 1));
      }
    };
    auto add_products = [&](uint32_t steps) __attribute__((always_inline)) {
      if constexpr (!kKeepsProducts) return;
      const float upper = __uint_as_float(steps << 16), lower = __uint_as_float(steps & 0xFFFF0000u);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float (&sum)[4] = sums[j], (&product)[4] = products[j];
        sum[0] += upper * product[0], sum[1] += upper * product[1];
        sum[2] += lower * product[2], sum[3] += lower * product[3];
        product[0] = product[1] = product[2] = product[3] = 0;
      }
    };
    const typename Stage::Steps own_steps(group_shift);
    const uint32_t own_tiles = kept(Stage::tile_at(Slot(), 0, Tile::kDepthTiles));  // of whole stages, in slot 0
    const bool stage_has_one_step = !Code::kHasSteps || 1 << group_shift >= Tile::kDepthTiles;
    for (int left = depth_tiles; left > 0; left -= Tile::kDepthTiles, slot.next()) {
      barrier_wait(Stage::full(slot.index), slot.parity);
      const auto steps = own_steps.of(slot);
      if (left >= Tile::kDepthTiles && stage_has_one_step) {
#pragma unroll
        for (int t = 0; t < Tile::kDepthTiles; ++t)
          multiply_tile(t, own_tiles + slot.index * Stage::kStageBytes + t * Code::kTileBytes);
        add_products(steps.first);
      } else {
#pragma unroll 1
        for (int t = 0; t < min(left, Tile::kDepthTiles); ++t) {
          multiply_tile(t, Stage::tile_at(slot, t, min(left, Tile::kDepthTiles)));
          add_products(steps.of(t));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(Stage::empty(slot.index));
    }
  }
};
