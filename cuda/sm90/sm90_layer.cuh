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

  static constexpr int kHiddenThere = GateUp::kCopiersReady + 1;  // barrier

  // What the block does, for any number of groups while the slots are still on their way.
  __device__ __forceinline__ static void plan(const GroupedGemm& gate_up) {
    Deal deal;
    if constexpr (Tile::kCuts) {
      deal = SupposedItems<Tile>{gate_up.rows, gate_up.depth, int(threadIdx.x) % 128 + 1, gate_up.partials != nullptr}.deal();
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
    barrier_of<128 * Tile::kConsumers>(GateUp::kReady);
    store_release_if(threadIdx.x == 0, ends + blockIdx.x, kArrived);
  }

  // By the warps that bring tokens: waits for all blocks' part of the hidden rows.  All blocks run, and none waits for
  // this one before it has stored its part; if one never does, the launch fails after some seconds, by a store to nowhere.
  __device__ __forceinline__ static void wait_for_gate_up(const uint64_t* ends) {
    if (threadIdx.x % 128 < 32) {
      int left = 1 << 24;
      bool missing = true;
      while (missing && --left) {
        missing = false;
#pragma unroll 4
        for (int block = threadIdx.x % 32; block < gridDim.x; block += 32)
          missing |= load_relaxed(ends + block) != kArrived;
        missing = __any_sync(~0u, missing);
      }
      fence_acquire();
      store_release_if(left == 0, nullptr, 0);
    }
    barrier_of<32 * Down::kTokenWarps>(kHiddenThere);
  }

  __device__ __forceinline__ static void run(const FewSlotsLayer& layer) {
    const bool copies = GateUp::begin(layer.gate_up, [&] { plan(layer.gate_up); });
    const Items<Tile> gate_up(layer.gate_up), down(layer.down);
    const LaunchOf<Tile> gate_up_launch = gate_up.template launch<true>();
    typename GateUp::Slot slot;
    if (copies) {
      registers_down<GateUp::kCopyRegisters>();
      GateUp::bring_all(gate_up, gate_up_launch, slot);
      const LaunchOf<Tile> down_launch(down);
      if (Down::brings_tokens()) wait_for_gate_up(layer.ends);
      Down::bring_all(down, down_launch, slot);
    } else {
      registers_up<GateUp::kMultiplyRegisters>();
      GateUp::consume_all(gate_up, gate_up_launch, slot);
      end_gate_up(layer.ends);
      Down::consume_all(down, LaunchOf<Tile>(down), slot);
    }
  }
};

template <class Code, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void sm90_layer(const __grid_constant__ FewSlotsLayer layer) {
  Sm90Layer<Code, Tile>::run(layer);
}
