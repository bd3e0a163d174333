// Stores the sums of an item as rows of the output, in bf16.
#pragma once
#include "sums.cuh"

template <class Code, class Tile, bool kGateUp>
struct Epilogue {
  using Stage = Stages<Code, Tile, kGateUp>;
  using Sums = typename ItemSums<Tile>::Sums;
  static constexpr int kPartTiles = ItemSums<Tile>::kPartTiles;

  // Stores the sums of an item.
  __device__ __forceinline__ static void store(const GroupedGemm& gemm, const WorkItem& work, const Sums& sums) {
    const TokenGroup& group = work.group;
    const float scale = Code::scale(work.dense(gemm));
    const int first_strip = work.row_tile * Tile::kStrips;
#pragma unroll
    for (int s = 0; s < Tile::kStripsPerWarp; ++s) {
      const int strips = first_strip + s * 4 * Tile::kConsumers;
      store_tiles<0, kPartTiles>(gemm, strips, scale, sums[s], uniform(group.count[0]),
                                 [&](int column) { return group.sorted_row(0, token_of(column)); });
      store_tiles<kPartTiles, kPartTiles>(gemm, strips, scale, sums[s], uniform(group.count[1]),
                                          [&](int column) { return group.sorted_row(1, token_of(column)); });
    }
  }

  // The token of a part whose sums are in a column of its tiles: of integers, four tokens have every second of a tile.
  __device__ static int token_of(int column) {
    return Tile::kIntegers ? column / 8 * 8 + column % 8 / 2 + column % 2 * 4 : column;
  }

  // Stores a warpgroup's sums, kTiles tiles from the kFirst on, 32 tokens of one strip of each warp at a time, through
  // shared memory: there its four warps' rows meet and leave as whole lines of a token.  sorted_row(token) gives the
  // row in expert order, below 0 beyond the last.
  template <int kFirst, int kTiles, class SortedRow>
  __device__ __forceinline__ static void store_tiles(const GroupedGemm& gemm, int first_strip, float scale,
                                                     const float (&sums)[2 * kPartTiles][4], int count,
                                                     SortedRow sorted_row) {
    constexpr int kStripBytesOut = kGateUp ? 16 : 32;  // of a token, from one strip
    constexpr int kVectors = 4 * kStripBytesOut / 16, kTokensPerPass = 128 / kVectors;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const uint32_t staging = Stage::staging(group);
    const int width = kGateUp ? gemm.rows / 2 : gemm.rows;
    const int vector = threadIdx.x % kVectors, token = threadIdx.x % 128 / kVectors;
    // Rows of the output that this thread stores, -1: none.  Those of slots are read at once, before they are needed.
    int places[(kTiles * 8 + kTokensPerPass - 1) / kTokensPerPass];
#pragma unroll
    for (int i = 0; i < int(sizeof places / sizeof *places); ++i) {
      const int row = sorted_row(i * kTokensPerPass + token);
      places[i] = row < 0 || kGateUp ? row : gemm.sorted_slots[row];
    }

#pragma unroll
    for (int first = 0; first < kTiles; first += 4) {
      if (first * 8 >= count) break;
      const int own_strips = first_strip + group * 4;
      const int strip = own_strips + vector * 16 / kStripBytesOut;
      __nv_bfloat16* out = gemm.out + own_strips * (kStripBytesOut / 2) + vector * 8;
      auto tile = [&](int t, int lower) {  // a lane's share of an 8 x 8 matrix; nothing beyond the last tile
        if (first + t >= kTiles) return 0u;
        const float (&sum)[4] = sums[kFirst + (first + t < kTiles ? first + t : 0)];
        return kGateUp ? gated(sum, scale) : pack_bf16(sum[2 * lower] * scale, sum[2 * lower + 1] * scale);
      };
      const uint32_t row = staging + lane % 8 * Stage::kStagingPitch + warp * kStripBytesOut;
      if constexpr (kGateUp) {
        const uint32_t matrices[4] = {tile(0, 0), tile(1, 0), tile(2, 0), tile(3, 0)};
        store_transposed_x4(row + lane / 8 * 8 * Stage::kStagingPitch, matrices);
      } else {
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          const uint32_t matrices[4] = {tile(t, 0), tile(t, 1), tile(t + 1, 0), tile(t + 1, 1)};
          store_transposed_x4(row + (t + lane / 16) * 8 * Stage::kStagingPitch + lane / 8 % 2 * 16, matrices);
        }
      }
      warpgroup_barrier(1 + group);
#pragma unroll
      for (int i = 0; i < 32 / kTokensPerPass; ++i) {
        const int pass = first * 8 / kTokensPerPass + i;
        if (pass >= int(sizeof places / sizeof *places) || places[pass] < 0 || strip >= gemm.rows / 16) continue;
        *reinterpret_cast<uint4*>(out + int64_t(places[pass]) * width) =
            load_shared_16(staging + (i * kTokensPerPass + token) * Stage::kStagingPitch + vector * 16);
      }
      warpgroup_barrier(1 + group);
    }
  }
};
