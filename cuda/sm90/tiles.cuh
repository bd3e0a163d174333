// The tiles of the kernels of compute capability 9.0.
#pragma once

// What they have in common.  A tile also has
//   kPartTokens: tokens of each of the two parts;
//   kWidthStep: the step of the widths that products come in, up to kPartTokens;
//   kCuts: items' depth may be cut between blocks;
//   kFenceLag: 0 if the threads that multiply make tokens visible to wgmma, in every stage.  Else those that gather
//     them do, so many stages after they began to, which needs stages to spare.
template <int kConsumers_, int kBlocks_, int kTableStride_, int kGateUpCopyRegisters = 32, int kDownCopyRegisters = 32>
struct Sm90Tile {
  static constexpr int kConsumers = kConsumers_;      // warpgroups that multiply
  static constexpr int kBlocks = kBlocks_;            // that share a multiprocessor
  static constexpr int kTableStride = kTableStride_;  // of a code's table
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Strips of 16 rows: a warp's are 4 * kConsumers apart.
  static constexpr int kStripsPerWarp = 1, kStrips = 4 * kConsumers * kStripsPerWarp;
  static constexpr bool kIntegers = false;  // mma.sync multiplies integers, see tokens_int8.cuh; else wgmma, in bf16
  // Of a thread that copies, which needs more for more tokens, and more in gate and up, where it divides slots; and of
  // one that multiplies; together what the compiler gives all threads alike.
  static constexpr int kThreadRegisters = 65536 / (kBlocks * kThreads) / 8 * 8;
  static constexpr int copy_registers(bool gate_up) {
    return kThreadRegisters > 128 ? 72 : gate_up ? kGateUpCopyRegisters : kDownCopyRegisters;
  }
  static constexpr int multiply_registers(bool gate_up) {
    return (kThreadRegisters * kThreads - copy_registers(gate_up) * 128) / (128 * kConsumers) / 8 * 8;
  }
  static constexpr int kDepth = 64;  // columns per stage: 128 bytes of a token, one swizzle row
  static constexpr int kDepthTiles = kDepth / 16;
};

// For trellis words alone.  Two strips a warp, so that what it reads of the tokens serves both.
struct Imma8 : Sm90Tile<4, 1, 128> {
  static constexpr bool kIntegers = true, kCuts = true;
  static constexpr int kPartTokens = 8, kWidthStep = 8, kFenceLag = 0;
  static constexpr int kStripsPerWarp = 2, kStrips = 4 * kConsumers * kStripsPerWarp;
};
struct Wgmma16 : Sm90Tile<4, 1, 256> {
  static constexpr bool kCuts = true;
  static constexpr int kPartTokens = 16, kWidthStep = 16, kFenceLag = 2;
};
struct Wgmma32 : Sm90Tile<4, 1, 256> {
  static constexpr bool kCuts = true;
  static constexpr int kPartTokens = 32, kWidthStep = 16, kFenceLag = 2;
};
struct Wgmma48 : Sm90Tile<4, 1, 256, 48, 40> {
  static constexpr bool kCuts = true;
  static constexpr int kPartTokens = 48, kWidthStep = 48, kFenceLag = 0;
};
struct Wgmma64 : Sm90Tile<2, 1, 128> {
  static constexpr bool kCuts = false;
  static constexpr int kPartTokens = 64, kWidthStep = 32, kFenceLag = 0;
};
// Around 64 tokens of an expert, where half of the experts would have twice the columns that they need.
struct Wgmma80 : Sm90Tile<2, 1, 128> {
  static constexpr bool kCuts = false;
  static constexpr int kPartTokens = 80, kWidthStep = 80, kFenceLag = 0;
};
struct Wgmma128 : Sm90Tile<2, 1, 128> {
  static constexpr bool kCuts = false;
  static constexpr int kPartTokens = 128, kWidthStep = 64, kFenceLag = 0;
};
