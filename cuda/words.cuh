// Kernel order of weights, and how a lane turns one load of a pair into the weights of either expert.
//
// A [N, K] matrix is cut into 16 x 16 tiles, stored strip by strip: [N/16][K/16][lane 32][8 elements], where lane
// 4g + c holds exactly its registers of an m16k16 A operand (mma and wgmma agree on it):
//   row g, columns 2c 2c+1 | row g+8, 2c 2c+1 | row g, 2c+8 2c+9 | row g+8, 2c+8 2c+9.
// In the gate-and-up matrix, strip s holds gate rows 8s..8s+7 as its rows 0..7 and up rows 8s..8s+7 as its rows
// 8..15, so that a gate and its up value meet in one thread's accumulators.
#pragma once
#include <cstdint>

// Pair word in kernel order: [15] sign 0, [14] mask 0, [13] sign 1, [12] mask 1, [11:7] exponent - 112, [6:0] mantissa.
// With its mask as the top exponent bit the word already is a bf16: the weight times 2^16 where the mask is set, and
// below 2^-95 where it is not, which vanishes beside any product it is added to.  The epilogue takes the 2^16 back.
//
// Two weights take three instructions, (words << shift) & upper | words & lower, and the same three with other
// constants pass the plain bf16 weights of dense experts through.
class Mask16 {
 public:
  static constexpr int kTileBytes = 512;
  using Words = uint4;

  __device__ Mask16(bool dense, int position)
      : shift_(dense ? 0 : 2 * position), upper_(dense ? 0xFFFFFFFFu : 0xC000C000u), lower_(dense ? 0 : 0x0FFF0FFFu) {}

  __device__ static float scale(bool dense) { return dense ? 1.0f : 1.0f / 65536.0f; }

  // One lane's A registers of a tile.
  __device__ void decode(const Words& words, uint32_t (&a)[4]) const {
    a[0] = weight_pair(words.x);
    a[1] = weight_pair(words.y);
    a[2] = weight_pair(words.z);
    a[3] = weight_pair(words.w);
  }

 private:
  __device__ uint32_t weight_pair(uint32_t words) const { return ((words << shift_) & upper_) | (words & lower_); }

  int shift_;
  uint32_t upper_, lower_;
};
