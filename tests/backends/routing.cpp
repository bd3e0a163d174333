// Runs the kernels of cuda/routing.cu on the host, whose instructions it stands in for: a block's threads take turns, in
// random order, from one barrier to the next.  Built and run by test_cuda_routing.py with the source and what it needs of
// grouped.cuh; prints the first broken promise, else how many launches were checked.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

namespace {

using std::max;
using std::min;

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x; };
using cudaError_t = int;
using cudaStream_t = void*;
using __nv_bfloat16 = uint16_t;

int2 make_int2(int x, int y) { return {x, y}; }
int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
int __popc(uint32_t bits) { return __builtin_popcount(bits); }
float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t bf16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
uint32_t pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
void wait_for_previous_kernel() {}
void let_next_kernel_start() {}

void require(bool holds, const char* promise) {
  if (holds) return;
  printf("%s\n", promise);
  exit(1);
}

enum class Wait { none, warp, block, ended };

constexpr int kMostThreads = 512;
Index threadIdx, blockIdx, blockDim;
ucontext_t scheduler, contexts[kMostThreads];
std::vector<char> stacks[kMostThreads];
Wait waits[kMostThreads];
int exchanged[kMostThreads];
std::function<void()> body;
std::mt19937 draw(1);

void wait_at(Wait barrier) {
  const int own = threadIdx.x;
  waits[own] = barrier;
  swapcontext(&contexts[own], &scheduler);
}
void __syncthreads() { wait_at(Wait::block); }
void __syncwarp() { wait_at(Wait::warp); }

// What all lanes of the warp give, between two barriers of theirs.
template <class Read>
auto exchange(int value, Read read) {
  exchanged[threadIdx.x] = value;
  __syncwarp();
  auto result = read(&exchanged[threadIdx.x / 32 * 32], threadIdx.x % 32);
  __syncwarp();
  return result;
}
int __shfl_up_sync(uint32_t, int value, int step) {
  return exchange(value, [=](const int* lanes, int lane) { return lanes[lane < step ? lane : lane - step]; });
}
int __shfl_down_sync(uint32_t, int value, int step) {
  return exchange(value, [=](const int* lanes, int lane) { return lanes[lane + step > 31 ? lane : lane + step]; });
}
uint32_t __match_any_sync(uint32_t, int value) {
  return exchange(value, [](const int* lanes, int lane) {
    uint32_t same = 0;
    for (int other = 0; other < 32; ++other) same |= uint32_t(lanes[other] == lanes[lane]) << other;
    return same;
  });
}

void thread_main() {
  body();
  wait_at(Wait::ended);
}

// Lets threads go on that all wait at the same barrier.
void release(int first, int end, Wait barrier) {
  if (std::all_of(waits + first, waits + end, [=](Wait wait) { return wait == barrier; }))
    std::fill(waits + first, waits + end, Wait::none);
}

void run_block(int threads) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int thread = 0; thread < threads; ++thread) {
    waits[thread] = Wait::none;
    stacks[thread].resize(1 << 15);
    getcontext(&contexts[thread]);
    contexts[thread].uc_stack.ss_sp = stacks[thread].data();
    contexts[thread].uc_stack.ss_size = stacks[thread].size();
    makecontext(&contexts[thread], thread_main, 0);
  }
  for (bool ran = true; ran;) {
    ran = false;
    std::shuffle(order.begin(), order.end(), draw);
    for (int thread : order) {
      if (waits[thread] != Wait::none) continue;
      ran = true;
      threadIdx.x = thread;
      swapcontext(&scheduler, &contexts[thread]);
    }
    for (int first = 0; first < threads; first += 32) release(first, min(first + 32, threads), Wait::warp);
    release(0, threads, Wait::block);
  }
  require(std::all_of(waits, waits + threads, [](Wait wait) { return wait == Wait::ended; }),
          "all threads come to a barrier, or none");
}

template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int blocks, int threads, int, cudaStream_t,
                         Arguments... arguments) {
  require(threads <= kMostThreads, "a block has no more threads than there are experts");
  body = [=] { kernel(Parameters(arguments)...); };
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
  return 0;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  memset(address, value, bytes);
  return 0;
}
cudaError_t cudaGetLastError() { return 0; }

}  // namespace

#include "routing_on_the_host.cuh"

namespace {

struct Sizes {
  int pairs, dense, topk, tokens, part_tokens;
  bool on_a_rank;  // half of twice as many experts
};

constexpr int kPoison = -7777777;

void check(const Sizes& sizes) {
  const int local = 2 * sizes.pairs + sizes.dense, total = sizes.on_a_rank ? 2 * local : local;
  std::vector<int> map(total, -1), ids, all(total);
  for (int expert = 0; expert < local; ++expert) map[local / 2 * sizes.on_a_rank + expert] = expert;
  std::iota(all.begin(), all.end(), 0);
  for (int token = 0; token < sizes.tokens; ++token) {
    for (int k = 0; k < sizes.topk; ++k) std::swap(all[k], all[k + draw() % (total - k)]);
    ids.insert(ids.end(), all.begin(), all.begin() + sizes.topk);
    if (token % 5 == 3) ids[ids.size() - 1 - token % sizes.topk] = -1;
  }
  const int slots = ids.size();
  auto expert_of = [&](int slot) { return ids[slot] < 0 ? -1 : map[ids[slot]]; };

  Routing routing{};
  std::vector<int> counts(local, kPoison), sorted(slots, kPoison), group_counts(2, kPoison);
  routing.topk_ids = ids.data(), routing.expert_map = sizes.on_a_rank ? map.data() : nullptr;
  routing.slots = slots, routing.topk = sizes.topk, routing.pairs = sizes.pairs, routing.dense = sizes.dense;
  std::vector<TokenGroup> groups(routing.max_groups(sizes.part_tokens) + 1);
  memset(groups.data(), 0x55, groups.size() * sizeof(TokenGroup));
  routing.counts = counts.data(), routing.sorted_slots = sorted.data(), routing.groups = groups.data();
  routing.group_counts = group_counts.data();
  route(routing, sizes.part_tokens, nullptr);

  require(0 <= group_counts[0] && group_counts[0] <= group_counts[1] &&
              group_counts[1] <= routing.max_groups(sizes.part_tokens),
          "there is room for all groups");
  std::vector<int> rows_of(slots, 0), seen(slots, 0);
  for (int g = 0; g < group_counts[1]; ++g) {
    const TokenGroup& group = groups[g];
    require(group.first <= g && g < group.first + group.unit_groups && groups[group.first].unit == group.unit,
            "a unit's groups follow one another");
    require((group.unit < sizes.pairs) == (g < group_counts[0]), "groups of pairs come first");
    require(group.count[0] > 0, "no group is empty");
    for (int part = 0; part < 2; ++part) {
      const int position = group.positions >> part & 1;
      const bool paired = group.unit < sizes.pairs;
      const int expert = paired ? 2 * group.unit + position : sizes.pairs + group.unit;
      require(group.count[part] <= sizes.part_tokens, "no part has too many tokens");
      for (int row = group.start[part]; row < group.start[part] + group.count[part]; ++row) {
        require(0 <= row && row < slots, "rows are those of slots");
        const int slot = sorted[row];
        require(0 <= slot && slot < slots && expert_of(slot) == expert, "a part's rows are of its expert");
        ++rows_of[row], ++seen[slot];
      }
    }
  }
  for (int slot = 0; slot < slots; ++slot)
    require(seen[slot] == (expert_of(slot) >= 0) && rows_of[slot] <= 1, "every slot with an expert here has one row");

  if (routing.in_fixed_order()) {
    const std::vector<int> before = sorted;
    route(routing, sizes.part_tokens, nullptr);
    require(sorted == before, "one block gives equal orders");
  }

  const int hidden = 16;
  std::vector<__nv_bfloat16> outputs(size_t(slots) * hidden), out(size_t(sizes.tokens) * hidden, 0x7FC0);
  std::vector<float> weights(slots);
  for (int slot = 0; slot < slots; ++slot) {
    const bool here = expert_of(slot) >= 0;
    weights[slot] = here ? 1 + int(draw() % 4) : NAN;
    for (int i = 0; i < hidden; ++i) outputs[slot * hidden + i] = here ? bf16_of(int(draw() % 9) - 4) : 0x7FC0;
  }
  combine(outputs.data(), weights.data(), routing, out.data(), sizes.tokens, hidden, nullptr);
  for (int token = 0; token < sizes.tokens; ++token)
    for (int i = 0; i < hidden; ++i) {
      float sum = 0;
      for (int slot = token * sizes.topk; slot < (token + 1) * sizes.topk; ++slot)
        if (expert_of(slot) >= 0) sum += weights[slot] * __uint_as_float(uint32_t(outputs[slot * hidden + i]) << 16);
      require(out[token * hidden + i] == bf16_of(sum), "a token's output is the sum of its experts' here");
    }
}

}  // namespace

int main() {
  struct Model {
    int pairs, dense, topk;
  };
  int launches = 0;
  // Qwen3-Next's and Kimi-K2's experts, all in pairs and half; Mixtral's; odd numbers, and no pairs at all.
  for (Model model : {Model{256, 0, 10}, {128, 256, 10}, {192, 0, 8}, {96, 192, 8}, {4, 0, 2}, {37, 5, 10}, {0, 385, 10}})
    for (int tokens : {1, 53, kOneBlockSlots / model.topk, kOneBlockSlots / model.topk + 1})
      for (bool on_a_rank : {false, true})
        check({model.pairs, model.dense, model.topk, tokens, launches % 3 ? 16 : 64, on_a_rank}), ++launches;
  printf("%d\n", launches);
}
