// What the e4m3 kernels multiply: tiles of one expert's tokens, quantised.
//
// An expert's rows, padded to eight, follow one another in expert order.  Of each row, 128 columns lie together as 128
// bytes, in the swizzle that wgmma reads; then come the same columns of the next row.  So the tokens of a stage are one
// run of memory.  In every 16 columns, the order is that of the weights in words_fp8.cuh: column 2c, 2c+8, 2c+1, 2c+9.
// Columns beyond the depth are zeros.
#pragma once
#include "routing.cuh"
#include "words_fp8.cuh"

constexpr int kFp8TileTokens = 256, kFp8Depth = 128, kFp8MaxDepth = 65536;

// Row of the quantised tokens where an expert's part begins that begins at a sorted row.  Its parts are multiples of
// eight rows apart.
PM_HOST_DEVICE inline int padded_row(int sorted_row, int expert) { return (sorted_row / 8 + expert) * 8; }

// Everything that route() and the two quantising passes write; the last in device memory.
struct Fp8Plan {
  TokenGroup* tiles;  // of one part each
  int* tile_count;
  uint8_t* rows;      // e4m3 [depth / 128 rounded up][padded()][128]
  float* scales;      // [padded()], a token's largest magnitude over 448
  int* slots;         // [padded()], a row's (token, k) slot
  int experts, slot_count;

  int64_t row_bytes(int depth) const { return int64_t(depth + kFp8Depth - 1) / kFp8Depth * kFp8Depth * padded(); }
  __host__ __device__ int padded() const { return (slot_count + 7) / 8 * 8 + 8 * experts; }
  __host__ __device__ int max_tiles() const { return experts + slot_count / kFp8TileTokens; }
};

// A product of quantised tokens with the merged experts' words.
struct Fp8Gemm : GroupedGemm {
  const uint8_t* tokens;  // Fp8Plan's rows, scales and slots
  const float* scales;
  const int* slots;
  int padded;
  ByteSums sums;          // what words mean
  float unit;             // what their e4m3 values times the steps are multiplied by
};

// Cuts the merged experts' rows into tiles, as few and as even as may be.  After route().
cudaError_t plan_fp8(const Routing& routing, const Fp8Plan& plan, cudaStream_t stream);

// Quantises the rows of all tiles: of tokens, bf16 [tokens, depth], which it gathers by slot, or, if `sorted`, of
// [slots, depth] in expert order.
cudaError_t quantise(const __nv_bfloat16* from, int depth, bool sorted, const Routing& routing, const Fp8Plan& plan,
                     cudaStream_t stream);
