// Kernel order of weights, and how a lane turns one load of a pair into the weights of either expert.
//
// A [N, K] matrix is cut into 16 x 16 tiles; a strip is 16 rows of it.  Blocks of 8 strips x 4 tiles (what is left at
// the edges) follow one another along the depth, then along the rows; in a block, the tiles of each strip follow one
// another.  So a stage of 128 rows x 64 columns is one run of memory.  Of a tile's 256 elements, lane 4g + c of a warp
// holds the eight that are its registers of an m16k16 A operand (mma and wgmma agree on it):
//   row g, columns 2c 2c+1 | row g+8, 2c 2c+1 | row g, 2c+8 2c+9 | row g+8, 2c+8 2c+9.
// In the gate-and-up matrix, strip s holds gate rows 8s..8s+7 as its rows 0..7 and up rows 8s..8s+7 as its rows
// 8..15, so that a gate and its up value meet in one thread's accumulators.
//
// Codes with steps have them in the order [K/group][N/16][8][2]: rows g and g+8 of a strip in one 32-bit register.
//
// A code is a class, made for the positions of the two parts of a token group, with
//   kTileBytes, Words: of a tile and of one lane's share of it, which load() reads from shared memory; odd: whether the
//     tile's number in the depth is;
//   Entries: what look_up() makes of words, for both positions;
//   take_apart(): of entries, a lane's A registers of part 0 and, if kTwo, of part 1, which has the other position;
//   kPositionsCost: whether both positions take nearly twice the instructions of one;
//   kHasSteps: whether weights are what take_apart() gives times the step of their row and group;
//   kTableEntries, kStride: of the table in shared memory that it looks words up in, 0 for none;
//   kReadsDense: whether it also decodes the bf16 weights of dense experts, which are stored as its own tiles are;
//   scale(): what the sums are multiplied by in the end.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

#include "ptx.cuh"

constexpr int kBlockStrips = 8, kBlockTiles = 4;

__device__ inline __nv_bfloat162 as_bf16x2(uint32_t bits) { return reinterpret_cast<__nv_bfloat162&>(bits); }

__device__ inline uint32_t multiply_bf16x2(uint32_t a, __nv_bfloat162 b) {
  __nv_bfloat162 product = __hmul2(as_bf16x2(a), b);
  return reinterpret_cast<uint32_t&>(product);
}

// A lane's A registers times the steps of its rows.
__device__ inline void multiply_by_steps(uint32_t (&a)[4], uint32_t steps) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    a[j] = multiply_bf16x2(a[j], j % 2 ? __high2bfloat162(as_bf16x2(steps)) : __low2bfloat162(as_bf16x2(steps)));
}

// What codes with a 16-bit word per pair share.
struct WordPerPair {
  static constexpr int kTileBytes = 512, kTableEntries = 0, kStride = 0;
  static constexpr bool kHasSteps = false, kPositionsCost = false;
  using Words = uint4;
  using Entries = Words;

  __device__ static Words load(uint32_t tile, int lane, bool) { return load_shared_16(tile + lane * 16); }
  __device__ static Entries look_up(const Words& words) { return words; }
};

// Pair word in kernel order: [15] sign 0, [14] mask 0, [13] sign 1, [12] mask 1, [11:7] exponent - 112, [6:0] mantissa.
// With its mask as the top exponent bit the word already is a bf16: the weight times 2^16 where the mask is set, and
// below 2^-95 where it is not, which vanishes beside any product it is added to.  The epilogue takes the 2^16 back.
//
// Two weights take three instructions, (words << shift) & upper | words & lower, and the same three with other
// constants pass the plain bf16 weights of dense experts through.
class Mask16 : public WordPerPair {
 public:
  static constexpr bool kReadsDense = true;

  __device__ Mask16(bool dense, int position0, int position1, uint32_t)
      : shift0_(dense ? 0 : 2 * position0),
        shift1_(dense ? 0 : 2 * position1),
        upper_(dense ? 0xFFFFFFFFu : 0xC000C000u),
        lower_(dense ? 0 : 0x0FFF0FFFu) {}

  __device__ static float scale(bool dense) { return dense ? 1.0f : 1.0f / 65536.0f; }

  template <bool kTwo>
  __device__ void take_apart(const Entries& words, uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a0[j] = ((pairs[j] << shift0_) & upper_) | (pairs[j] & lower_);
      if (kTwo) a1[j] = ((pairs[j] << shift1_) & upper_) | (pairs[j] & lower_);
    }
  }

 private:
  int shift0_, shift1_;
  uint32_t upper_, lower_;
};

// The stored word: [15] sign 0, [14] sign 1, [13:12] direction d, [11:0] magnitude times 2^-112 as a bf16's low bits.
// Moved below the exponent of 1.0, d is the bf16 1 + d/4, which one multiply-add makes (15 - 4d)/16 or (3 + 4d)/16
// times 2^112.
class Angle16 : public WordPerPair {
 public:
  static constexpr bool kReadsDense = false;

  __device__ Angle16(bool, int position0, int position1, uint32_t) : first_(position0), second_(position1) {}

  __device__ static float scale(bool) { return 1.0f; }

  template <bool kTwo>
  __device__ void take_apart(const Entries& words, uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t direction = ((pairs[j] >> 7) & 0x00600060u) | 0x3F803F80u, magnitude = pairs[j] & 0x0FFF0FFFu;
      a0[j] = first_.weights(pairs[j], direction, magnitude);
      if (kTwo) a1[j] = second_.weights(pairs[j], direction, magnitude);
    }
  }

 private:
  struct Position {
    static constexpr float kLarge = 0x1p112f;
    int shift;
    __nv_bfloat162 slope, offset;

    __device__ explicit Position(int position)
        : shift(position),
          slope(__float2bfloat162_rn(position ? kLarge : -kLarge)),
          offset(__float2bfloat162_rn((position ? -13.0f / 16 : 31.0f / 16) * kLarge)) {}
    __device__ uint32_t weights(uint32_t words, uint32_t direction, uint32_t magnitude) const {
      return multiply_bf16x2(((words << shift) & 0x80008000u) | magnitude,
                             __hfma2(as_bf16x2(direction), slope, offset));
    }
  };
  Position first_, second_;
};

// Words of kBits that a table turns into two weights: entry w has the bf16 value of word w at position 0 in its low
// half and at position 1 in its high half.  Every lane has a copy of the table in its own bank of shared memory, so a
// look-up is one load without conflicts, and both experts' weights come of it.  That leaves one or two instructions a
// word for the integer pipe, which arithmetic decoding would keep busier than the memory.
//
// A lane's share of a tile is its eight words as one little-endian number; of six-bit words, the lanes' lower 32 bits
// come first, then their upper 16.
//
// kStride: bytes from an entry to the next.  128 leaves no gaps; with 256, and the table at a multiple of 64 KiB, the
// place of an eight-bit word is one byte permute.
template <int kBits, int kStride_>
class TableWords {
 public:
  static constexpr int kTileBytes = 32 * kBits, kTableEntries = 1 << kBits, kStride = kStride_;
  static constexpr bool kHasSteps = true, kReadsDense = false, kPositionsCost = false;
  struct Words {
    uint32_t low, high;
  };
  struct Entries {
    uint32_t of[8];
  };

  // table: this lane's place in entry 0.
  __device__ TableWords(bool, int position0, int position1, uint32_t table)
      : table_(table), half0_(half(position0)), half1_(half(position1)) {}

  __device__ static float scale(bool) { return 1.0f; }

  __device__ static Words load(uint32_t tile, int lane, bool) {
    if constexpr (kBits == 8) {
      const uint2 both = load_shared_8(tile + lane * 8);
      return {both.x, both.y};
    } else {
      return {load_shared_4(tile + lane * 4), load_shared_2(tile + 128 + lane * 2)};
    }
  }

  __device__ Entries look_up(const Words& words) const {
    Entries entries;
#pragma unroll
    for (int i = 0; i < 8; ++i) entries.of[i] = load_unchanging_4(place(words, i));
    return entries;
  }

  template <bool kTwo>
  __device__ void take_apart(const Entries& entries, uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a0[j] = __byte_perm(entries.of[2 * j], entries.of[2 * j + 1], half0_);
      if (kTwo) a1[j] = __byte_perm(entries.of[2 * j], entries.of[2 * j + 1], half1_);
    }
  }

 private:
  static_assert((kBits == 8 || kBits == 6) && (kStride == 128 || kStride == 256));

  __device__ static uint32_t half(int position) { return position ? 0x7632 : 0x5410; }

  // Of word i in the table.
  __device__ uint32_t place(const Words& words, int i) const {
    if constexpr (kBits == 8) {
      const uint32_t four = i < 4 ? words.low : words.high;
      if constexpr (kStride == 256) return __byte_perm(four, table_, 0x7604 | i % 4 << 4);
      return table_ + __byte_perm(four, 0, 0x4440 | i % 4) * kStride;
    } else {
      const uint32_t shifted = i < 6 ? __funnelshift_r(words.low, words.high, 6 * i) : words.high >> (6 * i - 32);
      return table_ + (shifted & 63) * kStride;
    }
  }

  uint32_t table_, half0_, half1_;
};
