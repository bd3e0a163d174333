// How a lane turns pair words of codes with steps into e4m3 weights of one position, four in a register.
//
// A word has a sign for each position, a level m and a direction d.  Its magnitude at a position is the e4m3 byte
// (LEVEL[m] + DIRECTION[d]) / 2, rounded down: the code's own bytes are E3M4, whose mantissa has one bit more, and
// LEVEL has the rounding in it.  The tables have at most eight entries, so that a byte permute looks four of them up.
//
// A class has, as those of words.cuh, kTileBytes and load(); and
//   weights(): of a lane's share of a tile, the A registers of its two rows.  A register's bytes are the columns
//   2c, 2c+8, 2c+1, 2c+9 of the tile; the tokens' are in the same order (quantise.cuh).
#pragma once
#include "words.cuh"

// levels, directions: bytes of the tables, directions at the position in question.
struct ByteSums {
  uint2 levels, directions[2];
};

template <int kBits>
class Fp8Words {
 public:
  using Table = TableWords<kBits, 128>;
  using Words = typename Table::Words;
  static constexpr int kTileBytes = Table::kTileBytes;
  static constexpr bool kReadsDense = false;

  __device__ Fp8Words(const ByteSums& sums, int position)
      : levels_(sums.levels),
        directions_(position ? sums.directions[1] : sums.directions[0]),
        sign_factor_(kBits == 8 ? (position ? 16 : 1) : (position ? 8 : 4)),
        sixteen_(kept(16)) {}

  __device__ static Words load(uint32_t tile, int lane) { return Table::load(tile, lane, false); }

  __device__ __forceinline__ void weights(const Words& words, uint32_t& upper_row, uint32_t& lower_row) const {
    uint32_t first, second;  // words 0..3 and 4..7, a byte each: both rows' columns 2c, 2c+1, and 2c+8, 2c+9
    if constexpr (kBits == 8) {
      first = words.low, second = words.high;
    } else {
      first = spread(words.low), second = spread(__funnelshift_r(words.low, words.high, 24));
    }
    // In every byte, the index of the first's word low and of the second's high.
    uint32_t level, direction;
    if constexpr (kBits == 8) {
      level = (first & 0x07070707u) | ((second * sixteen_) & 0x70707070u);
      direction = ((first >> 4) & 0x07070707u) | (second & 0x70707070u);
    } else {
      level = (first & 0x03030303u) | ((second * sixteen_) & 0x30303030u);
      direction = ((first >> 2) & 0x03030303u) | ((second << 2) & 0x30303030u);
    }
    upper_row = signed_bytes(level, direction, __byte_perm(first, second, 0x5140));
    lower_row = signed_bytes(level >> 16, direction >> 16, __byte_perm(first, second, 0x7362));
  }

 private:
  // Four six-bit fields as bytes.
  __device__ static uint32_t spread(uint32_t fields) {
    const uint32_t twelves = (fields & 0xFFFu) | ((fields << 4) & 0xFFF0000u);
    return (twelves & 0x003F003Fu) | ((twelves << 2) & 0x3F003F00u);
  }

  __device__ uint32_t signed_bytes(uint32_t level, uint32_t direction, uint32_t signs) const {
    const uint32_t sums =
        __byte_perm(levels_.x, levels_.y, level) + __byte_perm(directions_.x, directions_.y, direction);
    uint32_t bytes;  // the sums' seven bits and the signs
    asm("lop3.b32 %0, %1, %2, 0x7F7F7F7F, 0xE4;" : "=r"(bytes) : "r"(sums >> 1), "r"(signs * sign_factor_));
    return bytes;
  }

  uint2 levels_, directions_;
  // Shifts to the left are multiplications by what the compiler does not know: the pipe for logic, which shifts share,
  // is what decoding is short of.
  uint32_t sign_factor_, sixteen_;
};
