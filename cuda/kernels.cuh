// The kernel variants that a caller may choose from, and how a source makes them.
#pragma once
#include "grouped.cuh"
#include "launch.cuh"
#include "puzzlemoe.h"
#include "quantise.cuh"
#include "trellis_words.cuh"

struct Kernel {
  const char* name;    // arch_instruction and the tokens of a part
  int part_tokens;
  int partial_floats;  // of the sums of pieces of items, 0: cuts none
  int min_capability;  // 10 * major + minor
  int max_capability;
  // Launches one of the two products on as many blocks as the device holds at once.
  cudaError_t (*launch)(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream);
  // Kernels that multiply merged experts in e4m3 have this instead, and a kernel for the others.
  cudaError_t (*launch_fp8)(int code, bool gate_up, const Fp8Gemm& gemm, cudaStream_t stream) = nullptr;
  const Kernel* dense = nullptr;
};

// The kernels of this library by number, from 0 on; null beyond the last.
int kernel_count();
const Kernel* find_kernel(int index);

// Launches one of the two products of one code.  Gemm<Code, Tile, kGateUp> has a kernel's kFunction and kSharedBytes.
template <template <class, class, bool> class Gemm, class Code, class Tile, bool kGateUp>
cudaError_t launch_product(const GroupedGemm& gemm, cudaStream_t stream) {
  using Product = Gemm<Code, Tile, kGateUp>;
  static std::atomic<int> known[kMaxDevices];
  int blocks;
  if (cudaError_t error =
          resident_blocks(Product::kFunction, Tile::kThreads, Product::kSharedBytes, known, blocks))
    return error;
  return launch_early(Product::kFunction, blocks, Tile::kThreads, Product::kSharedBytes, stream, gemm);
}

template <template <class, class, bool> class Gemm, class Code, class Tile>
cudaError_t launch_code(bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  return gate_up ? launch_product<Gemm, Code, Tile, true>(gemm, stream)
                 : launch_product<Gemm, Code, Tile, false>(gemm, stream);
}

// Kernel::launch of the kernels that Gemm and Tile make.
template <template <class, class, bool> class Gemm, class Tile>
cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_MASK16: return launch_code<Gemm, Mask16, Tile>(gate_up, gemm, stream);
    case PM_CODE_ANGLE16: return launch_code<Gemm, Angle16, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE8: return launch_code<Gemm, TableWords<8, Tile::kTableStride>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE6: return launch_code<Gemm, TableWords<6, Tile::kTableStride>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TRELLIS8: return launch_code<Gemm, TrellisWords<8, Tile::kRaised>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TRELLIS6: return launch_code<Gemm, TrellisWords<6, Tile::kRaised>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TRELLIS5: return launch_code<Gemm, TrellisWords<5, Tile::kRaised>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TRELLIS4: return launch_code<Gemm, TrellisWords<4, Tile::kRaised>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TRELLIS3: return launch_code<Gemm, TrellisWords<3, Tile::kRaised>, Tile>(gate_up, gemm, stream);
  }
  return cudaErrorInvalidValue;
}
