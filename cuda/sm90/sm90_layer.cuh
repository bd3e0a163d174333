// Both products of a layer with few slots in one launch.  Its blocks go on to the down projection without a new start:
// its words are on their way while gate and up end elsewhere, and only its tokens wait for that.
#pragma once
#include "few_slots.cuh"
#include "sm90_gemm.cuh"

template <class Code, class Tile>
struct Sm90Layer {
  using GateUp = Sm90Gemm<Code, Tile, true>;
  using Down = Sm90Gemm<Code, Tile, false>;
  static_assert(Tile::kPlans && GateUp::Stage::kSharedBytes == Down::Stage::kSharedBytes);

  static constexpr int kHiddenThere = GateUp::kCopiersReady + 1, kEnded = ItemSums<Tile>::kOthersLeft + 1;  // barriers

  // What the block does, for any number of groups while the slots are still on their way.
  __device__ __forceinline__ static void plan(const GroupedGemm& gate_up) {
    Deal deal;
    if constexpr (Tile::kCuts) {
      const int groups = threadIdx.x % 128 + 1;
      deal = SupposedItems<Tile>{gate_up.rows, gate_up.depth, groups, gate_up.partials != nullptr}.deal();
      Share& share = deal.share;  // worked out here, not where it is first needed
      asm volatile("" : "+r"(deal.cut), "+r"(deal.dealers), "+r"(share.rest_first), "+r"(share.rest_end));
      asm volatile("" : "+r"(share.dealt), "+r"(share.dealt_end), "+r"(share.start));
    }
    wait_for_previous_kernel();
    const int expert = FewSlots::own_expert(gate_up.choices);
    FewSlots::make<Tile::kPartTokens, GateUp::kCopiersReady>(gate_up.choices, expert, deal);
  }

  // By those who multiply: all that this block has of gate and up is stored.
  __device__ __forceinline__ static void end_gate_up(uint64_t* ends) {
    if constexpr (ItemSums<Tile>::kHasMessenger) return come_to_barrier_of<ItemSums<Tile>::kParties>(kEnded);
    barrier_of<128 * Tile::kConsumers>(GateUp::kReady);
    store_release_if(threadIdx.x == 0, ends + blockIdx.x, kArrived);
  }
  // By the messenger, where there is one.
  __device__ __forceinline__ static void tell_end(uint64_t* ends) {
    if constexpr (!ItemSums<Tile>::kHasMessenger) return;
    barrier_of<ItemSums<Tile>::kParties>(kEnded);
    store_release_if(threadIdx.x % 32 == 0, ends + blockIdx.x, kArrived);
  }

  // By the warps that bring tokens: waits for all blocks' part of the hidden rows.  All blocks run, and none waits for
  // this one before it has stored its part; if one never does, the launch fails, by a store to nowhere.
  __device__ __forceinline__ static void wait_for_gate_up(const uint64_t* ends, int warp) {
    constexpr int kThreads = 32 * Down::kTokenWarps, kFlags = (kMaxMultiprocessors + kThreads - 1) / kThreads;
    const int own = warp * 32 + threadIdx.x % 32;
    int rounds = kMaxRounds;
    bool missing = true;
    while (missing && --rounds) {
      uint64_t flags[kFlags];  // read together
#pragma unroll
      for (int i = 0; i < kFlags; ++i) {
        const int block = i * kThreads + own;
        flags[i] = block < gridDim.x ? load_relaxed(ends + block) : kArrived;
      }
      missing = false;
#pragma unroll
      for (int i = 0; i < kFlags; ++i) missing |= flags[i] != kArrived;
      missing = __any_sync(~0u, missing);
      if (missing) __nanosleep(40);
    }
    fence_acquire();
    store_release_if(rounds == 0, nullptr, 0);
    barrier_of<32 * Down::kTokenWarps>(kHiddenThere);
  }

  __device__ __forceinline__ static void run(const FewSlotsLayer& layer) {
    const bool copies = GateUp::begin(layer.gate_up, [&] { plan(layer.gate_up); });
    const Items<Tile> gate_up(layer.gate_up), down(layer.down);
    const LaunchOf<Tile> gate_up_launch = gate_up.template launch<true>();
    typename GateUp::Slot slot;
    if (copies) {
      registers_down<GateUp::kCopyRegisters>();
      const int warp = GateUp::copy_warp();
      GateUp::bring_all(gate_up, gate_up_launch, warp, slot);
      const LaunchOf<Tile> down_launch(down);
      if (Down::brings_tokens(warp)) wait_for_gate_up(layer.ends, Down::token_warp(warp));
      else if (warp != Down::kWordWarp) tell_end(layer.ends);
      Down::bring_all(down, down_launch, warp, slot);
    } else {
      registers_up<GateUp::kMultiplyRegisters>();
      GateUp::consume_all(gate_up, gate_up_launch, slot);
      end_gate_up(layer.ends);
      Down::consume_all(down, LaunchOf<Tile>(down), slot);
    }
  }
};

template <class Code, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void sm90_layer(
    const __grid_constant__ FewSlotsLayer layer) {
  Sm90Layer<Code, Tile>::run(layer);
}
