// Sums over the threads of a block that has one for every expert there may be.
#pragma once
#include "routing.cuh"

__device__ inline void operator+=(int2& sum, int2 value) { sum.x += value.x, sum.y += value.y; }
__device__ inline void operator-=(int2& sum, int2 value) { sum.x -= value.x, sum.y -= value.y; }
__device__ inline int shuffled_up(int value, int lanes) { return __shfl_up_sync(~0u, value, lanes); }
__device__ inline int2 shuffled_up(int2 value, int lanes) {
  return {shuffled_up(value.x, lanes), shuffled_up(value.y, lanes)};
}

// Sum of the threads before this one, and over all kMaxExperts threads; of an int, or of two at once.
template <class Value>
__device__ inline Value sum_before(Value value, Value& total) {
  constexpr int kWarps = kMaxExperts / 32;
  __shared__ Value warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Value inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const Value other = shuffled_up(inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  Value before = inclusive;
  before -= value;
  total = {};
  for (int w = 0; w < kWarps; ++w) {
    const Value sum = warp_sums[w];
    if (w < warp) before += sum;
    total += sum;
  }
  return before;
}
