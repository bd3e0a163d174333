// Grouped GEMM of compute capability 9.0: one warp copies words, two gather tokens, two or four warpgroups decode and
// multiply; only barriers of the stages connect them.  Weights are the A operand, in registers; tokens are the B
// operand.
#pragma once
#include "epilogue.cuh"
#include "mainloop_imma.cuh"
#include "mainloop_wgmma.cuh"

template <class Code, class Tile, bool kGateUp>
struct Sm90Gemm {
  using Stage = Stages<Code, Tile, kGateUp>;
  using Slot = typename Stage::Slot;
  using Sums = typename ItemSums<Tile>::Sums;

  // Multiplies a piece: kTiles0 tiles of part 0 and kTiles1 of part 1.  kOnePosition: that of both parts.
  template <int kTiles0, int kTiles1, bool kOnePosition = false>
  __device__ __forceinline__ static void multiply(const GroupedGemm& gemm, const WorkItem& work, int depth_tiles,
                                                  Slot& slot, Sums& sums) {
    const Code code(work.dense(gemm), work.position(0), work.position(1), Stage::own_table());
    float own[kTiles0 + kTiles1][4] = {};
    WgmmaMainloop<Code, Tile, kGateUp>::template multiply<kTiles0, kTiles1, kOnePosition>(
        depth_tiles, gemm.group_shift, slot, code, own);
    ItemSums<Tile>::template set<kTiles0>(own, sums);
  }

  // The same of integers, in tiles of four tokens.
  template <int kFours0, int kFours1, bool kOnePosition = false>
  __device__ __forceinline__ static void multiply_fours(const GroupedGemm& gemm, const WorkItem& work, int count0,
                                                        int count1, int depth_tiles, Slot& slot, Sums& sums) {
    constexpr int kPartFours = Tile::kPartTokens / 4;
    if constexpr (!kOnePosition && kFours1 == 0 && kFours0 < kPartFours)
      if (count0 > 4 * kFours0)
        return multiply_fours<kFours0 + 1, 0>(gemm, work, count0, count1, depth_tiles, slot, sums);
    if constexpr (!kOnePosition && kFours1 < kPartFours)
      if (count1 > 4 * kFours1)
        return multiply_fours<kFours0, kFours1 + 1>(gemm, work, count0, count1, depth_tiles, slot, sums);
    ImmaMainloop<Code, Tile, kGateUp>::template multiply<kFours0, kFours1, kOnePosition>(
        depth_tiles, gemm.group_shift, slot, work.position(0), sums);
  }

  // Calls multiply with the narrowest products that hold the parts' tokens.  Their widths have to be known at compile
  // time, and deciding outside the loop over the stages leaves nothing in it that the compiler takes for divergence.
  template <int kTiles0, int kTiles1>
  __device__ __forceinline__ static void multiply_parts(const GroupedGemm& gemm, const WorkItem& work, int count0,
                                                        int count1, int depth_tiles, Slot& slot, Sums& sums) {
    constexpr int kStep = Tile::kWidthStep / 8;
    if constexpr (kTiles1 == 0 && kTiles0 < ItemSums<Tile>::kPartTiles)
      if (count0 > 8 * kTiles0)
        return multiply_parts<kTiles0 + kStep, 0>(gemm, work, count0, count1, depth_tiles, slot, sums);
    if constexpr (kTiles1 < ItemSums<Tile>::kPartTiles)
      if (count1 > 8 * kTiles1)
        return multiply_parts<kTiles0, kTiles1 + kStep>(gemm, work, count0, count1, depth_tiles, slot, sums);
    multiply<kTiles0, kTiles1>(gemm, work, depth_tiles, slot, sums);
  }

  __device__ __forceinline__ static void multiply_piece(const Items<Tile>& items, const Piece& piece,
                                                        const WorkItem& work, Slot& slot, Sums& sums) {
    const GroupedGemm& gemm = items.gemm;
    const int count0 = uniform(work.group.count[0]), count1 = uniform(work.group.count[1]);
    const int tiles = items.tiles(piece);
    if constexpr (Tile::kIntegers) {
      constexpr int kPartFours = Tile::kPartTokens / 4;
      if (count1 > 0 && uniform(work.position(0) == work.position(1)))
        return multiply_fours<kPartFours, kPartFours, true>(gemm, work, count0, count1, tiles, slot, sums);
      return multiply_fours<1, 0>(gemm, work, count0, count1, tiles, slot, sums);
    } else {
      multiply_bf16(gemm, work, count0, count1, tiles, slot, sums);
    }
  }

  __device__ __forceinline__ static void multiply_bf16(const GroupedGemm& gemm, const WorkItem& work, int count0,
                                                       int count1, int tiles, Slot& slot, Sums& sums) {
    if constexpr (Code::kPositionsCost) {
      constexpr int kPartTiles = ItemSums<Tile>::kPartTiles;
      if (count1 > 0 && uniform(work.position(0) == work.position(1)))
        return multiply<kPartTiles, kPartTiles, true>(gemm, work, tiles, slot, sums);
    }
    multiply_parts<Tile::kWidthStep / 8, 0>(gemm, work, count0, count1, tiles, slot, sums);
  }

  // The start of an item, which comes last, is completed outside the loop: a loop in it, over the pieces that other
  // blocks left, would make the compiler take the whole loop for divergent, and compute addresses lane by lane.
  __device__ __forceinline__ static void consume_all(const Items<Tile>& items, const LaunchOf<Tile>& launch) {
    Slot slot;
    Sums sums;
    Walk walk(items, launch);
    Piece piece;
    if constexpr (!Tile::kCuts) return consume_whole(items, walk, slot, sums);
    WorkItem work;
    bool starts = false;
    if constexpr (Tile::kIntegers) {
      // The next piece's item is read while this one is multiplied: registers are left here.
      Piece next_piece;
      WorkItem next;
      bool more = walk.next(items, piece);
      if (more) work = items.work(piece);
      while (!starts && more) {
        more = walk.next(items, next_piece);
        if (more) next = items.work(next_piece);
        multiply_piece(items, piece, work, slot, sums);
        starts = piece.first_stage == 0 && piece.end_stage < launch.stages;
        if (piece.first_stage > 0) ItemSums<Tile>::leave(items, work.group, sums);
        else if (!starts) Epilogue<Code, Tile, kGateUp>::store(items.gemm, work, sums);
        if (!starts) piece = next_piece, work = next;
      }
    } else {
      while (!starts && walk.next(items, piece)) {
        work = items.work(piece);
        multiply_piece(items, piece, work, slot, sums);
        starts = Tile::kCuts && piece.first_stage == 0 && piece.end_stage < launch.stages;
        if (Tile::kCuts && piece.first_stage > 0) ItemSums<Tile>::leave(items, work.group, sums);
        else if (!starts) Epilogue<Code, Tile, kGateUp>::store(items.gemm, work, sums);
      }
      if (starts) work = items.work(piece);
    }
    if (!starts) return;
    ItemSums<Tile>::add_left(items, work.group, launch.last_dealer(piece), sums);
    Epilogue<Code, Tile, kGateUp>::store(items.gemm, work, sums);
  }

  // Of items that are never cut.  Each is read while the one before it is multiplied: its reads depend on one another.
  __device__ __forceinline__ static void consume_whole(const Items<Tile>& items, Walk<Tile, Items<Tile>>& walk,
                                                       Slot& slot, Sums& sums) {
    Piece piece, next_piece;
    WorkItem work, next;
    bool more = walk.next(items, piece);
    if (more) work = items.work(piece);
    while (more) {
      more = walk.next(items, next_piece);
      if (more) next = items.work(next_piece);
      multiply_piece(items, piece, work, slot, sums);
      Epilogue<Code, Tile, kGateUp>::store(items.gemm, work, sums);
      piece = next_piece, work = next;
    }
  }

  // By the warpgroup that copies.
  __device__ __forceinline__ static void bring_all(const Items<Tile>& items, const LaunchOf<Tile>& launch) {
    const int warp = uniform(threadIdx.x % 128 / 32);
    if constexpr (Tile::kIntegers) {
      if (warp != 2) Stage::quantise_tokens(items, launch, warp - (warp > 2));
      else Stage::copy_words(items, launch);
    } else {
      if (warp < 2) Stage::gather_tokens(items, launch);
      else if (warp == 2) Stage::copy_words(items, launch);
    }
  }

  static constexpr int kCopyRegisters = Tile::copy_registers(kGateUp);
  static constexpr int kMultiplyRegisters = Tile::multiply_registers(kGateUp);

  // Nobody waits for the table but those that look words up in it: words are on their way by then.
  static constexpr int kReady = 0, kCopiersReady = 1 + Tile::kConsumers;  // barriers

  __device__ __forceinline__ static void run(const GroupedGemm& gemm) {
    extern __shared__ __align__(1024) uint8_t shared[];
    if (shared_address(shared) != SharedLayout::kStart) __trap();
    const bool copies = uniform(threadIdx.x / 128) == Tile::kConsumers;
    if (copies) {
      if (threadIdx.x % 128 == 0) Stage::init_barriers();
      // The groups come from kernels that had ended before gate and up let the down projection start.
      if constexpr (kGateUp) wait_for_previous_kernel();
      barrier_of<128>(kCopiersReady);
      come_to_barrier_of<Tile::kThreads>(kReady);
      let_next_kernel_start();
    } else {
      fill_table<Code, 128 * Tile::kConsumers>(gemm, Stage::kTable);
      barrier_of<Tile::kThreads>(kReady);
    }
    const Items<Tile> items(gemm);
    const LaunchOf<Tile> launch(items);
    if (copies) {
      registers_down<kCopyRegisters>();
      bring_all(items, launch);
    } else {
      registers_up<kMultiplyRegisters>();
      consume_all(items, launch);
    }
  }
};

template <class Code, class Tile, bool kGateUp>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void sm90_gemm(const __grid_constant__ GroupedGemm gemm) {
  Sm90Gemm<Code, Tile, kGateUp>::run(gemm);
}
