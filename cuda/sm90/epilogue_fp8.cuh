// Stores the sums of an item of the e4m3 products as rows of the output, in bf16.
#pragma once
#include "mainloop_fp8.cuh"

template <class Code, bool kGateUp>
struct Fp8Epilogue {
  using Stage = Fp8Stages<Code>;
  using Slot = typename Stage::Slot;

  // Through shared memory, 32 tokens of a warpgroup at a time, as epilogue.cuh does.  Two places take turns, so that
  // one barrier a time is enough.  row_scales: of the lane's two rows.
  template <int kTiles>
  __device__ __forceinline__ static void store(const Fp8Gemm& gemm, const WorkItem& work, const Slot& slot,
                                               float2 row_scales, const float (&sums)[kTiles][4]) {
    constexpr int kStripBytesOut = kGateUp ? 16 : 32;  // of a token, from one strip
    constexpr int kVectors = 4 * kStripBytesOut / 16, kTokensPerPass = 128 / kVectors;
    constexpr int kPitch = Stage::kStagingPitch;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
    const int width = kGateUp ? gemm.rows / 2 : gemm.rows, count = uniform(work.group.count[0]);
    const int vector = threadIdx.x % kVectors, token = threadIdx.x % 128 / kVectors;
    const int own_strips = work.row_tile * Fp8Tile::kStrips + warpgroup * 4;
    const bool has_strip = own_strips + vector * 16 / kStripBytesOut < gemm.rows / 16;
    __nv_bfloat16* out = gemm.out + own_strips * (kStripBytesOut / 2) + vector * 8;

#pragma unroll
    for (int first = 0; first < kTiles; first += 4) {
      if (first * 8 >= count) break;
      const uint32_t staging = Stage::staging(warpgroup, first / 4 % 2);
      uint32_t upper[4], lower[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float (&sum)[4] = sums[first + t];
        const uint2 bits = load_shared_8(Stage::scales(slot.index) + ((first + t) * 8 + lane % 4 * 2) * 4);
        const float2 scale = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
        const float values[4] = {sum[0] * (row_scales.x * scale.x), sum[1] * (row_scales.x * scale.y),
                                 sum[2] * (row_scales.y * scale.x), sum[3] * (row_scales.y * scale.y)};
        upper[t] = kGateUp ? gated(values, 1.0f) : pack_bf16(values[0], values[1]);
        if (!kGateUp) lower[t] = pack_bf16(values[2], values[3]);
      }
      const uint32_t row = staging + lane % 8 * kPitch + warp * kStripBytesOut;
      if constexpr (kGateUp) {
        store_transposed_x4(row + lane / 8 * 8 * kPitch, upper);
      } else {
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          const uint32_t matrices[4] = {upper[t], lower[t], upper[t + 1], lower[t + 1]};
          store_transposed_x4(row + (t + lane / 16) * 8 * kPitch + lane / 8 % 2 * 16, matrices);
        }
      }
      warpgroup_barrier(1 + warpgroup);
#pragma unroll
      for (int at = token; at < Stage::kStagingTokens; at += kTokensPerPass) {
        const int own = first * 8 + at;
        if (own >= count || !has_strip) continue;
        const int64_t place = kGateUp ? work.group.start[0] + own : load_shared_4(Stage::slots(slot.index) + own * 4);
        *reinterpret_cast<uint4*>(out + place * width) = load_shared_16(staging + at * kPitch + vector * 16);
      }
    }
    // The places are free for the next item when all have read them.
    warpgroup_barrier(1 + warpgroup);
  }
};
