// The sums of an item in the registers of the warpgroups that multiply, and how those of an item that is cut between
// blocks come together.
#pragma once
#include "stages.cuh"

template <class Tile>
struct ItemSums {
  // By tiles of eight tokens: kPartTiles of part 0, then those of part 1.
  static constexpr int kPartTiles = Tile::kPartTokens / 8;
  using Sums = float[Tile::kStripsPerWarp][2 * kPartTiles][4];

  // Where tile j of products of which kTiles0 are part 0's is among the sums, and in the stage.
  template <int kTiles0>
  __device__ static constexpr int place(int j) {
    return j < kTiles0 ? j : kPartTiles + j - kTiles0;
  }
  template <int kTiles0, int kTiles>
  __device__ static void set(const float (&own)[kTiles][4], Sums& all) {
    float (&sums)[2 * kPartTiles][4] = all[0];
#pragma unroll
    for (int j = 0; j < 2 * kPartTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[place<kTiles0>(j)][i] = own[j][i];
  }

  // Where the sums of the piece that a dealer leaves are, this lane's of one token tile of one of its warp's strips.
  __device__ static float4* left_sums(const Items<Tile>& items, int dealer, int strip, int tile) {
    const int warp = block_of(items, dealer) * Tile::kStrips + strip * 4 * Tile::kConsumers + threadIdx.x / 32;
    return items.gemm.partials + (warp * (2 * kPartTiles) + tile) * 32 + threadIdx.x % 32;
  }
  // Whether those of this thread's warpgroup are there.
  __device__ static uint64_t* left_flag(const Items<Tile>& items, int dealer) {
    return items.gemm.arrivals + block_of(items, dealer) * Tile::kConsumers + threadIdx.x / 128;
  }

  // Those who set it were started before this block and wait for nobody.  If they never do, the launch fails, by a
  // store to nowhere: the compiler takes what follows a trap for divergent.
  __device__ static void take_flag(uint64_t* flag) {
    int rounds = kMaxRounds;
    while (load_acquire(flag) != kArrived && --rounds) __nanosleep(20);  // without a pause, others' stores arrive later
    store_release_if(rounds == 0, nullptr, 0);
    *flag = 0;
  }

  // Whether a tile of the sums has tokens.
  __device__ static bool used(const TokenGroup& group, int tile) {
    return tile % kPartTiles * 8 < group.count[tile / kPartTiles];
  }

  // Leaves the sums of a piece that is not an item's start; a block has one at most, its first.
  __device__ static void leave(const Items<Tile>& items, const TokenGroup& group, const Sums& sums) {
#pragma unroll
    for (int s = 0; s < Tile::kStripsPerWarp; ++s)
#pragma unroll
      for (int j = 0; j < 2 * kPartTiles; ++j)
        if (uniform(used(group, j))) {
          const float (&sum)[4] = sums[s][j];
          __stcg(left_sums(items, own_dealer(items), s, j), make_float4(sum[0], sum[1], sum[2], sum[3]));
        }
    warpgroup_barrier(1 + threadIdx.x / 128);
    store_release_if(threadIdx.x % 128 == 0, left_flag(items, own_dealer(items)), kArrived);
  }

  // Adds the sums that the next dealers up to the last have left, in their order.
  __device__ static void add_left(const Items<Tile>& items, const TokenGroup& group, int last_dealer, Sums& sums) {
    const int first = own_dealer(items) + 1;
    for (int dealer = first + threadIdx.x % 128; dealer <= last_dealer; dealer += 128)
      take_flag(left_flag(items, dealer));
    warpgroup_barrier(1 + threadIdx.x / 128);
#pragma unroll(kPartTiles <= 2 ? 4 : 1)  // of few sums, those of several dealers are read at once
    for (int dealer = first; dealer <= last_dealer; ++dealer) {
#pragma unroll
      for (int s = 0; s < Tile::kStripsPerWarp; ++s)
#pragma unroll
        for (int j = 0; j < 2 * kPartTiles; ++j) {
          if (!uniform(used(group, j))) continue;
          float (&sum)[4] = sums[s][j];
          const float4 other = __ldcg(left_sums(items, dealer, s, j));
          sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
        }
    }
  }
};
