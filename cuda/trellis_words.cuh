// Trellis words: how a lane finds the state that ends with each of its words, and the two weights of a state.
//
// What a state's values are, puzzlemoe_vllm/format/codes/trellis.py says.  There a tile is 8 x 32; two of them, one
// below the other, are the two 16 x 16 tiles of a strip that an even tile and the odd one after it are here.  Of each
// a lane has two runs of four words, run 0 in row g and run 1 in row g + 8.  Before a run of the odd tile comes the
// same lane's of the even one, and before a run of the even tile the previous lane's of the odd one: a lane loads its
// own runs and the end of those before them.
//
// In memory a tile is
//   8 bits: of every lane, run 0 and run 1;
//   6, 5 bits: of every lane, the last 16 bits of run 0 and of run 1; then of every lane what is left of them, run 0
//     in the lower bits,
// or, of an even tile with the odd one after it,
//   4 bits: of every lane, run 0 of both and run 1 of both, the even tile's in the lower bits;
//   3 bits: of that as one number, run 0 in the lower 24 bits, of every lane the lower 32 bits, then the upper 16.
#pragma once
#include "words.cuh"

// Values are integers v; under an exponent of 0x43, v + 62 is the bf16 v + 190, exactly.  So all there is to do is to
// bring two such integers into the halves of one register, and to subtract 190.
template <int kBits>
class TrellisWords {
 public:
  static constexpr int kTileBytes = 32 * kBits, kTableEntries = 0, kStride = 0;
  static constexpr bool kHasSteps = true, kReadsDense = false, kPositionsCost = true;
  struct Words {
    // Loads of the two planes, or of the two runs; of 4 and 3 bits both runs, each after what is before it.
    uint32_t first, second, first_before, second_before;
  };
  struct Entries {
    uint32_t of[8];  // states
  };

  __device__ TrellisWords(bool, int position0, int, uint32_t)
      : multiplier_(position0 ? kMultiplier : kMultiplier << 3),
        factors_(position0 ? 0xE020E020 : 0x20202020),
        offset_(position0 ? 0x433E00 : 0x430000) {}

  __device__ static float scale(bool) { return 1.0f; }

  __device__ static Words load(uint32_t tile, int lane, bool odd) {
    const uint32_t before = odd ? tile - kTileBytes : tile + kTileBytes;
    const int lane_before = odd ? lane : (lane + 31) % 32;
    if constexpr (kBits <= 4) {
      if (odd) return odd_runs(two_tiles(tile - kTileBytes, lane));
      return even_runs(two_tiles(tile, lane), two_tiles(tile, lane_before));
    }
    const uint2 own = one_tile(tile, lane);
    if constexpr (kBits == 8) {
      const uint2 end = one_tile(before, lane_before);
      return {own.x, own.y, end.x, end.y};
    }
    return {own.x, own.y, load_shared_4(before + lane_before * 4), 0};
  }

  // Of an even tile and the odd one after it: before the odd tile's runs come the even one's, which are there.
  __device__ static void load_two(uint32_t tile, int lane, Words (&two)[2]) {
    if constexpr (kBits <= 4) {
      const uint2 own = two_tiles(tile, lane);
      two[0] = even_runs(own, two_tiles(tile, (lane + 31) % 32)), two[1] = odd_runs(own);
      return;
    }
    two[0] = load(tile, lane, false);
    const uint2 own = one_tile(tile + kTileBytes, lane);
    two[1] = {own.x, own.y, two[0].first, kBits == 8 ? two[0].second : 0};
  }

  // What a position's weights are sums of: the four bytes of a state times the multiplier, masked, and at position 1
  // two of them subtracted from their largest value.  So the sum of the four is 62 more than the weight's value at
  // position 0, and eight times that at position 1.
  struct Bytes {
    uint32_t mask, turned;
    __device__ explicit Bytes(int position)
        : mask(position ? 0xF8F8F8F8 : 0x1F1F1F1F), turned(position ? 0xF800F800 : 0) {}
    __device__ uint32_t of(uint32_t x) const { return and_xor(x, mask, turned); }
  };
  __device__ static uint32_t multiplied(uint32_t state) { return state * kMultiplier; }

  __device__ static Entries look_up(const Words& words) {
    Entries entries;
    uint32_t states[4];
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      states_of(words, run, states);
#pragma unroll
      for (int i = 0; i < 4; ++i) entries.of[i / 2 * 4 + run * 2 + i % 2] = states[i];
    }
    return entries;
  }

  // kTwo: of positions 0 and 1, else of position 0 of the constructor.
  template <bool kTwo>
  __device__ void take_apart(const Entries& entries, uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t left = entries.of[2 * j], right = entries.of[2 * j + 1];
      if constexpr (kTwo) {
        const uint32_t x = left * kMultiplier, y = right * kMultiplier;
        // Subtracting is work for the pipe that multiplies; the other one packs then.
        a0[j] = centred(__byte_perm(low_sum(x, 0x433E00), low_sum(y, 0x433E00), 0x6420));
        a1[j] = centred(middle_bytes(high_sum(x, 0xE020E020, 0x433E00), high_sum(y, 0xE020E020, 0x433E00)));
      } else {
        a0[j] = centred(middle_bytes(high_sum(left * multiplier_, factors_, offset_),
                                     high_sum(right * multiplier_, factors_, offset_)));
      }
    }
  }

 private:
  static_assert(kBits == 8 || kBits == 6 || kBits == 5 || kBits == 4 || kBits == 3);
  static constexpr uint32_t kMultiplier = 0x794298A3;

  __device__ static uint32_t low_sum(uint32_t x, uint32_t offset) {
    return dot_bytes(x & 0x1F1F1F1F, 0x01010101, offset);
  }
  // Of the upper five bits of the bytes, times eight times the factors.  With a multiplier eight times as large they
  // are the lower five.
  __device__ static uint32_t high_sum(uint32_t x, uint32_t factors, uint32_t offset) {
    return dot_bytes(x & 0xF8F8F8F8, factors, offset);
  }
  __device__ static uint32_t middle_bytes(uint32_t left, uint32_t right) { return __byte_perm(left, right, 0x6521); }
  __device__ static uint32_t centred(uint32_t two) {
    const __nv_bfloat162 weights = __hadd2(as_bf16x2(two), __float2bfloat162_rn(-190.0f));
    return reinterpret_cast<const uint32_t&>(weights);
  }

  // Of 8 bits both runs, of 6 and 5 the two planes.
  __device__ static uint2 one_tile(uint32_t tile, int lane) {
    if constexpr (kBits == 8) return load_shared_8(tile + lane * 8);
    uint32_t rest = 0;
    if constexpr (kBits == 6) rest = load_shared_2(tile + 128 + lane * 2);
    if constexpr (kBits == 5) rest = load_shared_1(tile + 128 + lane);
    return {load_shared_4(tile + lane * 4), rest};
  }
  // Of an even tile and the odd one after it: both runs, or of 3 bits the two planes.
  __device__ static uint2 two_tiles(uint32_t tile, int lane) {
    if constexpr (kBits == 4) return load_shared_8(tile + lane * 8);
    return {load_shared_4(tile + lane * 4), load_shared_2(tile + 128 + lane * 2)};
  }
  // The odd tile's runs after those of the even one; of 3 bits, run 0 has something else in its upper eight.
  __device__ static Words odd_runs(uint2 own) {
    if constexpr (kBits == 4) return {own.x, own.y, 0, 0};
    return {own.x, own.y * 256 + (own.x >> 24), 0, 0};
  }
  // The even tile's, after those of the previous lane's odd one.
  __device__ static Words even_runs(uint2 own, uint2 before) {
    if constexpr (kBits == 4)
      return {__byte_perm(before.x, own.x, 0x5432), __byte_perm(before.y, own.y, 0x5432), 0, 0};
    const uint32_t run1 = own.y * 256 + (own.x >> 24);
    return {__funnelshift_l(before.x << 8, own.x, 12), run1 * 4096 + before.y / 16, 0, 0};
  }

  // Bits of `value` from `first` on, as many as a state has; those above are dropped.
  __device__ static uint32_t state_at(uint32_t value, int first) {
    if constexpr (kBits == 3) return first == 0 ? value & 0x7FFF : shifted_left(value, 17 - first) >> 17;
    if (first == 0) return value & 0xFFFF;
    if (first == 16) return value >> 16;
    // The multiplier's pipe may take the first shift; the compiler would rather shift and mask, for which it has none.
    return shifted_left(value, 16 - first) >> 16;
  }

  __device__ static void states_of(const Words& words, int run, uint32_t (&states)[4]) {
    if constexpr (kBits == 8) {
      const uint32_t own = run ? words.second : words.first;
      const uint32_t earlier = __funnelshift_l(run ? words.second_before : words.first_before, own, 8);
      states[0] = state_at(earlier, 0), states[1] = state_at(own, 0);
      states[2] = state_at(earlier, 16), states[3] = state_at(own, 16);
    } else if constexpr (kBits == 4) {
      const uint32_t window = run ? words.second : words.first;
      const uint32_t earlier = window >> 4;
      states[0] = run ? state_at(window, 4) : earlier & 0xFFFF, states[1] = __byte_perm(window, 0, 0x4421);
      states[2] = run ? state_at(window, 12) : __byte_perm(earlier, 0, 0x4421), states[3] = window >> 16;
    } else if constexpr (kBits == 3) {
      const uint32_t window = run ? words.second : words.first;
#pragma unroll
      for (int i = 0; i < 4; ++i) states[i] = state_at(window, 3 * i);
    } else {
      // The run from its lower end on, with whatever above, and the 16 bits before it with its own lower 16 above.
      uint32_t own;
      if constexpr (kBits == 6) own = __byte_perm(words.second, words.first, run ? 0x0761 : 0x0540);
      if constexpr (kBits == 5)
        own = run ? (words.first >> 16) * 16 + (words.second >> 4) : words.first * 16 + (words.second & 15);
      const uint32_t window = __byte_perm(words.first_before, own, run ? 0x5432 : 0x5410);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int first = kBits * (i + 1);
        states[i] = first <= 16 ? state_at(window, first) : state_at(own, first - 16);
      }
      states[3] = run ? words.first >> 16 : words.first & 0xFFFF;
    }
  }

  // For take_apart() of one position.
  uint32_t multiplier_, factors_, offset_;
};
