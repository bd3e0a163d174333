// Grouped GEMM of compute capability 9.0 in e4m3: one thread copies, two warpgroups decode and multiply.
#include "../kernels.cuh"
#include "epilogue_fp8.cuh"

namespace {

template <class Code, bool kGateUp>
struct Fp8Consumer {
  using Stage = Fp8Stages<Code>;
  using Slot = typename Stage::Slot;

  template <int kTiles, int kGroups>
  __device__ __forceinline__ static void consume(const Fp8Gemm& gemm, const Items<Fp8Tile>& items,
                                                 const WorkItem& work, Slot& slot) {
    float sums[kTiles][4] = {};
    StepQuotients steps;
    Fp8Mainloop<Code, kTiles, kGroups>::multiply(items, slot, Code(gemm.sums, work.group.positions), sums, steps);
    const float2 last = steps.last();
    Fp8Epilogue<Code, kGateUp>::store(gemm, work, slot, {last.x * gemm.unit, last.y * gemm.unit}, sums);
    if (threadIdx.x % 32 == 0) barrier_arrive(Stage::empty(slot.index));
    slot.next();
  }

  // The narrowest product that holds the tokens; where steps are many, two widths are enough.
  template <int kTiles, int kGroups>
  __device__ __forceinline__ static void consume_tokens(const Fp8Gemm& gemm, const Items<Fp8Tile>& items,
                                                        const WorkItem& work, int count, Slot& slot) {
    constexpr int kStep = kGroups == 1 ? Fp8Tile::kWidthStep / 8 : Fp8Tile::kPartTokens / 16;
    if constexpr (kTiles + kStep <= Fp8Tile::kPartTokens / 8)
      if (count > 8 * kTiles) return consume_tokens<kTiles + kStep, kGroups>(gemm, items, work, count, slot);
    consume<kTiles, kGroups>(gemm, items, work, slot);
  }

  template <int kGroups>
  __device__ __forceinline__ static void consume_all(const Fp8Gemm& gemm, const Items<Fp8Tile>& items,
                                                     const LaunchOf<Fp8Tile>& launch) {
    constexpr int kNarrowest = kGroups == 1 ? Fp8Tile::kWidthStep / 8 : Fp8Tile::kPartTokens / 16;
    Slot slot;
    Walk walk(items, launch);
    for (Piece piece; walk.next(items, piece);) {
      const WorkItem work = items.work(piece);
      consume_tokens<kNarrowest, kGroups>(gemm, items, work, uniform(work.group.count[0]), slot);
    }
  }
};

template <class Code, int kGroups, bool kGateUp>
__global__ __launch_bounds__(Fp8Tile::kThreads, 1) void fp8_gemm(const __grid_constant__ Fp8Gemm gemm) {
  using Stage = Fp8Stages<Code>;
  extern __shared__ __align__(1024) uint8_t shared[];
  if (shared_address(shared) != Stage::kStart) __trap();
  if (threadIdx.x == 0) Stage::init_barriers();
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Items<Fp8Tile> items(gemm);
  const LaunchOf<Fp8Tile> launch(items);
  if (uniform(threadIdx.x / 128) == Fp8Tile::kConsumers) {
    registers_down<Fp8Tile::kCopyRegisters>();
    if (threadIdx.x % 128 == 0) Stage::template copy<kGateUp>(gemm, items, launch);
  } else {
    registers_up<Fp8Tile::kMultiplyRegisters>();
    Fp8Consumer<Code, kGateUp>::template consume_all<kGroups>(gemm, items, launch);
  }
}

template <class Code, bool kGateUp>
cudaError_t launch_groups(const Fp8Gemm& gemm, cudaStream_t stream) {
  constexpr int kThreads = Fp8Tile::kThreads, kShared = Fp8Stages<Code>::kSharedBytes;
  switch (Fp8Tile::kDepthTiles >> gemm.group_shift) {
    case 1: return launch_resident<fp8_gemm<Code, 1, kGateUp>, kThreads, kShared>(gemm, stream);
    case 2: return launch_resident<fp8_gemm<Code, 2, kGateUp>, kThreads, kShared>(gemm, stream);
    case 4: return launch_resident<fp8_gemm<Code, 4, kGateUp>, kThreads, kShared>(gemm, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Code>
cudaError_t launch_code(bool gate_up, const Fp8Gemm& gemm, cudaStream_t stream) {
  return gate_up ? launch_groups<Code, true>(gemm, stream) : launch_groups<Code, false>(gemm, stream);
}

cudaError_t launch(int code, bool gate_up, const Fp8Gemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_TABLE8: return launch_code<Fp8Words<8>>(gate_up, gemm, stream);
    case PM_CODE_TABLE6: return launch_code<Fp8Words<6>>(gate_up, gemm, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

extern const Kernel sm90_wgmma128;
extern const Kernel sm90_fp8_256{
    "sm90_fp8_256", 128, 0, 90, 90, codes(PM_CODE_TABLE8, PM_CODE_TABLE6), nullptr, &sm90_wgmma128, launch};
