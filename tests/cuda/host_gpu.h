// A thread block on the host, for kernels whose headers are compiled with this in place of those that hold their
// instructions: every thread is a context of its own, which runs until it waits for others, and warps and barriers
// behave as PTX says.  What it cannot show is what the memory model allows, and time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(bytes)

using std::max, std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

[[noreturn]] inline void fail(const char* reason) {
  fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, reason);
  abort();
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  uint32_t bits;
};
// What is not emulated; kernels that need it are compiled, never run.
inline void ldmatrix_x4(uint32_t (&)[4], uint32_t) { fail("no ldmatrix here"); }

struct Registers {
  uint32_t of[6];
};
struct Warp {
  int arrived = 0, turn = 0;
  Registers held[2][32];
};
struct NamedBarrier {
  int arrived = 0, turn = 0;
};
struct MemoryBarrier {
  int expected, pending, bytes, phase;

  void complete() {
    if (pending < 0) fail("more arrivals than a barrier expects");
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
};
struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<char> ended;
  std::vector<Warp> warps;
  std::map<int, NamedBarrier> named;
  std::map<uint32_t, MemoryBarrier> barriers;
  std::vector<char> stacks;
  std::vector<uint8_t> shared = std::vector<uint8_t>(228 * 1024, 0xFF);  // NaN, wherever nothing is written
};
inline Block* block;
inline uint8_t shared[1];  // kernels ask for its address alone

inline void let_others_run() { swapcontext(&block->threads[threadIdx.x], &block->scheduler); }

// What all lanes of the warp give.
inline const Registers* of_all_lanes(const Registers& own) {
  Warp& warp = block->warps[threadIdx.x / 32];
  const int turn = warp.turn;
  warp.held[turn % 2][threadIdx.x % 32] = own;
  if (++warp.arrived == 32) warp.arrived = 0, ++warp.turn;
  while (warp.turn == turn) let_others_run();
  return warp.held[turn % 2];
}
inline const Registers* of_all_lanes(uint32_t own) { return of_all_lanes(Registers{{own}}); }

inline void __syncwarp() { of_all_lanes(0); }
template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return Value(of_all_lanes(uint32_t(value))[lane % 32].of[0]);
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  const Registers* all = of_all_lanes(value);
  return std::max_element(all, all + 32, [](auto& a, auto& b) { return a.of[0] < b.of[0]; })->of[0];
}
inline int __reduce_add_sync(unsigned, int value) {
  uint32_t sum = 0;
  const Registers* all = of_all_lanes(uint32_t(value));
  for (int lane = 0; lane < 32; ++lane) sum += all[lane].of[0];
  return int(sum);
}
inline uint32_t kept(uint32_t value) { return value; }
inline uint32_t transpose_8x8(uint32_t value) {
  const Registers* all = of_all_lanes(value);
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  auto element = [&](int r, int c) { return all[r * 4 + c / 2].of[0] >> c % 2 * 16 & 0xFFFF; };
  return element(column, row) | element(column + 1, row) << 16;
}

// Shared memory, whose first bytes are the driver's.
constexpr uint32_t kShared = 1024;
inline uint8_t* shared_bytes(uint32_t place, size_t bytes) {
  if (place < kShared || place + bytes > block->shared.size()) fail("no such place in shared memory");
  return &block->shared[place];
}
template <class Value>
Value& shared_at(uint32_t place) {
  if (place % sizeof(Value)) fail("a place in shared memory is not aligned");
  return reinterpret_cast<Value&>(*shared_bytes(place, sizeof(Value)));
}
inline uint32_t shared_address(const void*) { return kShared; }
inline uint4 load_shared_16(uint32_t place) { return shared_at<uint4>(place); }
inline uint2 load_shared_8(uint32_t place) { return shared_at<uint2>(place); }
inline uint32_t load_shared_4(uint32_t place) { return shared_at<uint32_t>(place); }
inline uint32_t load_unchanging_4(uint32_t place) { return shared_at<uint32_t>(place); }
inline uint16_t load_shared_2(uint32_t place) { return shared_at<uint16_t>(place); }
inline uint32_t load_shared_1(uint32_t place) { return shared_at<uint8_t>(place); }
inline void store_shared_4(uint32_t place, uint32_t value) { shared_at<uint32_t>(place) = value; }
inline void store_shared_8(uint32_t place, uint32_t x, uint32_t y) { shared_at<uint2>(place) = {x, y}; }
inline void store_shared_16(uint32_t place, uint4 value) { shared_at<uint4>(place) = value; }
inline void store_transposed_x4(uint32_t place, const uint32_t (&r)[4]) {
  const Registers* all = of_all_lanes(Registers{{r[0], r[1], r[2], r[3]}});
  const int lane = threadIdx.x % 32, column = lane % 8;
  for (int row = 0; row < 8; ++row)
    shared_at<uint16_t>(place + 2 * row) = all[4 * row + column / 2].of[lane / 8] >> column % 2 * 16;
}

// Arithmetic.
inline uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += int(a >> i & 255) * int8_t(b >> i);
  return c;
}
inline uint32_t shifted_left(uint32_t value, int bits) { return value << bits; }
inline uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t turned) { return (value & mask) ^ turned; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> 4 * i & 15;
    if (byte > 7) fail("no byte's sign is spread here");
    result |= uint32_t(both >> 8 * byte & 255) << 8 * i;
  }
  return result;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int bits) {
  return uint32_t((uint64_t(high) << 32 | low) << bits >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int bits) {
  return uint32_t((uint64_t(high) << 32 | low) >> bits);
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t exact_bf16(float value) {
  if (__float_as_uint(value) & 0xFFFF) fail("this is no bf16");
  return __float_as_uint(value) >> 16;
}
inline __nv_bfloat162 __float2bfloat162_rn(float value) { return {exact_bf16(value) << 16 | exact_bf16(value)}; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  auto sum = [](uint32_t a, uint32_t b) { return exact_bf16(__uint_as_float(a) + __uint_as_float(b)); };
  return {sum(a.bits << 16, b.bits << 16) | sum(a.bits & 0xFFFF0000, b.bits & 0xFFFF0000) << 16};
}
inline float reciprocal(float value) { return 1 / value; }
inline float __fdividef(float a, float b) { return a / b; }
inline float exponential(float value) { return std::exp(value); }
#define __expf exponential  // the C library has a name like this
inline uint32_t bf16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float low_half(uint32_t two) { return __uint_as_float(two << 16); }
inline float high_half(uint32_t two) { return __uint_as_float(two & 0xFFFF0000); }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {pack_bf16(low_half(a.bits) * low_half(b.bits), high_half(a.bits) * high_half(b.bits))};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {pack_bf16(low_half(a.bits) * low_half(b.bits) + low_half(c.bits),
                    high_half(a.bits) * high_half(b.bits) + high_half(c.bits))};
}
inline __nv_bfloat162 __low2bfloat162(__nv_bfloat162 two) { return {two.bits << 16 | two.bits & 0xFFFF}; }
inline __nv_bfloat162 __high2bfloat162(__nv_bfloat162 two) { return {two.bits & 0xFFFF0000 | two.bits >> 16}; }
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Registers* all = of_all_lanes(Registers{{a[0], a[1], a[2], a[3], b0, b1}});
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) {  // two columns of the depth each
      const uint32_t two = all[row * 4 + k % 4].of[k / 4 * 2 + i / 2];
      const uint32_t b = all[(column + i % 2) * 4 + k % 4].of[4 + k / 4];
      d[i] += low_half(two) * low_half(b) + high_half(two) * high_half(b);
    }
}
inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  const Registers* all = of_all_lanes(Registers{{a[0], a[1], a[2], a[3], b0, b1}});
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  int sums[4] = {c[0], c[1], c[2], c[3]};
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 32; ++k) {
      const int upper = k / 16, from = k % 16 / 4, byte = k % 4 * 8;
      sums[i] += int(all[row * 4 + from].of[upper * 2 + i / 2] >> byte & 255) *
                 int8_t(all[(column + i % 2) * 4 + from].of[4 + upper] >> byte);
    }
  std::copy(sums, sums + 4, d);
}

// A warp's share of wgmma, which multiplies at once.  The descriptor is the first row's place in units of 16 bytes; rows
// are 128 bytes apart, and in each the places of 16 bytes are swizzled by the row.
inline uint64_t wgmma_descriptor(uint32_t place) { return place; }
template <int kColumns>
void wgmma_m64k16(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t descriptor) {
  const Registers* all = of_all_lanes(Registers{{a[0], a[1], a[2], a[3]}});
  const int lane = threadIdx.x % 32;
  for (int column = 0; column < kColumns; ++column) {
    if (column % 8 / 2 != lane % 4) continue;
    for (int k = 0; k < 16; k += 2) {
      const uint32_t place = descriptor * 16 + column * 128 + k * 2;
      const uint32_t b = shared_at<uint32_t>(place ^ (place >> 3 & 0x70));
      for (int lower = 0; lower < 2; ++lower) {
        const uint32_t two = all[lane / 4 * 4 + k % 8 / 2].of[k / 8 * 2 + lower];
        d[column / 8][lower * 2 + column % 2] += low_half(two) * low_half(b) + high_half(two) * high_half(b);
      }
    }
  }
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
inline void changes_here(uint32_t&) {}
inline void changes_here(float&) {}

// Global memory.
constexpr int kMaxMultiprocessors = 256;
template <class Value>
Value __ldcg(const Value* place) {
  return *place;
}
template <class Value>
void __stcg(Value* place, Value value) {
  *place = value;
}
inline void store_release_if(bool condition, uint64_t* place, uint64_t value) {
  if (condition) *place = value;
}
inline uint64_t load_acquire(const uint64_t* place) { return *place; }
inline void __nanosleep(unsigned) { fail("a block waits for one that comes after it"); }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

// Barriers and bulk copies, which are complete at once.
inline void barrier_init(uint32_t barrier, int arrivals) { block->barriers[barrier] = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_visible() {}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  MemoryBarrier& own = block->barriers.at(barrier);
  --own.pending, own.bytes += bytes;
  own.complete();
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }
inline void barrier_wait(uint32_t barrier, int parity) {
  const MemoryBarrier& own = block->barriers.at(barrier);
  while (own.phase % 2 == parity) let_others_run();
}
inline void bulk_copy(uint32_t place, const void* from, int bytes, uint32_t barrier) {
  if (bytes % 16 || place % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a bulk copy is not aligned");
  memcpy(shared_bytes(place, bytes), from, bytes);
  MemoryBarrier& own = block->barriers.at(barrier);
  own.bytes -= bytes;
  own.complete();
}
inline void cp_async_16(uint32_t place, const void* from) { memcpy(shared_bytes(place, 16), from, 16); }
inline void cp_async_commit() {}
template <int kPending>
void cp_async_wait() {}
inline void barrier_arrive_after_copies(uint32_t barrier) { barrier_arrive(barrier); }
inline void fence_async_proxy() {}
inline void come_to_barrier(int name, int threads) {
  NamedBarrier& own = block->named[name];
  if (++own.arrived == threads) own.arrived = 0, ++own.turn;
}
inline void wait_at_barrier(int name, int threads) {
  const int turn = block->named[name].turn;
  come_to_barrier(name, threads);
  while (block->named[name].turn == turn) let_others_run();
}
template <int kThreads>
void come_to_barrier_of(int name) {
  come_to_barrier(name, kThreads);
}
template <int kThreads>
void barrier_of(int name) {
  wait_at_barrier(name, kThreads);
}
inline void __syncthreads() { wait_at_barrier(0, block->threads.size()); }
inline void warpgroup_barrier(int name) { barrier_of<128>(name); }
template <int kRegisters>
void registers_up() {}
template <int kRegisters>
void registers_down() {}
inline void __trap() { fail("trap"); }

inline void (*thread_of_block)();
inline void run_thread() {
  thread_of_block();
  block->ended[threadIdx.x] = true;
  for (;;) let_others_run();
}

inline void start(Block& own, int threads) {
  constexpr int kStack = 128 * 1024;
  own.threads.resize(threads), own.ended.resize(threads), own.warps.resize(threads / 32);
  own.stacks.resize(size_t(threads) * kStack);
  for (int t = 0; t < threads; ++t) {
    getcontext(&own.threads[t]);
    own.threads[t].uc_stack.ss_sp = &own.stacks[size_t(t) * kStack];
    own.threads[t].uc_stack.ss_size = kStack;
    makecontext(&own.threads[t], run_thread, 0);
  }
}

// Lets every thread run until it waits for others; whether any is left.
inline bool run_on(Block& own) {
  bool more = false;
  block = &own;
  for (threadIdx.x = 0; threadIdx.x < own.threads.size(); ++threadIdx.x) {
    if (own.ended[threadIdx.x]) continue;
    more = true;
    swapcontext(&own.scheduler, &own.threads[threadIdx.x]);
  }
  return more;
}

// Runs blocks one after another, so that none may wait for one that comes later.
inline void run_blocks(int blocks, int threads, void (*kernel)()) {
  thread_of_block = kernel;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    Block own;
    start(own, threads);
    for (int left = 1 << 18; run_on(own);)
      if (--left == 0) fail("threads wait for one another");
  }
}
