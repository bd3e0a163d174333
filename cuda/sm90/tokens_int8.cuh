// Tokens as integers of two bytes, in shared memory, as mma.sync reads them: what the states of trellis words are
// multiplied by.
//
// Of each 64 columns of a token, the largest magnitude is kLargest steps of a scale.  A value is then 256 times an
// upper byte and a lower byte, both signed: two columns of the B operand.  The weight of a state is a sum over its four
// bytes, so the depth of the product is the bytes of the states, and a token's byte fills four rows of B.
#pragma once
#include "../ptx.cuh"

template <class Tile>
struct Int8Tokens {
  static constexpr int kFours = 2 * Tile::kPartTokens / 4;  // tiles of eight columns of B: four tokens
  static constexpr int kFourBytes = 4 * 128, kTileBytes = kFours * kFourBytes;
  static constexpr int kScales = Tile::kDepthTiles * kTileBytes;
  static constexpr int kBytes = kScales + 2 * Tile::kPartTokens * 16;
  static constexpr float kLargest = 32512;  // 127 * 256, so that rounding cannot overflow the upper byte

  // Of a token in a stage: what products are multiplied by, and what they then have too much, in all and in each half.
  struct Scale {
    float left, right, excess, scale;
  };

  // One warp, kMany tokens of which the first `count` are there, at `places` of a stage: a lane has columns 2 * lane
  // and the next.  halves: whether the halves of the stage have steps of their own.
  template <int kMany>
  __device__ static void store(uint32_t stage, const uint32_t (&places)[kMany], const uint32_t (&columns)[kMany],
                               int count, bool halves) {
    constexpr float kMagic = 0x1.8p23f;
    const uint32_t lane = threadIdx.x % 32;
    float most[kMany];
    uint32_t first[kMany], second[kMany];
    int all[kMany], left[kMany];
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      const uint32_t magnitudes = columns[i] & 0x7FFF7FFF;
      // Not below 2^-100: its inverse is finite.  NaN stays.
      most[i] = __uint_as_float(
          __reduce_max_sync(~0u, max(max(magnitudes >> 16, magnitudes & 0xFFFF), 27u << 7)) << 16);
    }
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      const float inverse = kLargest * reciprocal(most[i]);
      // In the lowest bits of kMagic + value + 128, the second byte is the upper byte; the first is the lower byte, but
      // for its highest bit.
      first[i] = __float_as_uint(fmaf(__uint_as_float(columns[i] << 16), inverse, kMagic + 128));
      second[i] = __float_as_uint(fmaf(__uint_as_float(columns[i] & 0xFFFF0000u), inverse, kMagic + 128));
      all[i] = int(first[i] + second[i] - 2 * (0x4B400000u + 128));
    }
    const uint32_t own = stage + (lane / 8 * kTileBytes + lane / 8 % 2 * 64 + lane % 4 * 16 + lane / 4 % 2 * 8);
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      if (i >= count) break;
      const uint32_t to = own + places[i] * 128;
      store_shared_8(to, __byte_perm(first[i], 0, 0x1111), __byte_perm(second[i], 0, 0x1111));
      store_shared_8(to ^ 64, __byte_perm(first[i] ^ 0x80, 0, 0), __byte_perm(second[i] ^ 0x80, 0, 0));
    }
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      // Where only all are asked for, a stage's right half has none or its own steps.
      left[i] = halves ? __reduce_add_sync(~0u, lane < 16 ? all[i] : 0) : 0;
      all[i] = __reduce_add_sync(~0u, all[i]);
      if (!halves) left[i] = all[i];
    }
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      if (i >= count || lane > 0) continue;
      const float scale = most[i] * (1 / kLargest), excess = 62 * scale;
      store_shared_16(stage + kScales + places[i] * 16,
                      make_uint4(__float_as_uint(excess * float(left[i])),
                                 __float_as_uint(excess * float(all[i] - left[i])),
                                 __float_as_uint(excess * float(all[i])), __float_as_uint(scale)));
    }
  }

  // A lane's place in a tile.  In odd tiles the two columns of a token change places: fewer stores meet at a bank.
  __device__ static uint32_t place(int lane, int tile) { return (lane * 16) ^ (tile % 2 * 64); }

  __device__ static Scale scale(uint32_t stage, int four, int lane) {
    const uint4 stored = load_shared_16(stage + kScales + (four * 4 + lane % 4) * 16);
    return {__uint_as_float(stored.x), __uint_as_float(stored.y), __uint_as_float(stored.z),
            __uint_as_float(stored.w)};
  }
};
