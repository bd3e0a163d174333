// The kernel variants that a caller may choose from, and how a source makes them.
#pragma once
#include "grouped.cuh"
#include "launch.cuh"
#include "puzzlemoe.h"
#include "quantise.cuh"
#include "trellis_words.cuh"

// A set of codes of PM_CODE_.
template <class... Codes>
constexpr uint32_t codes(Codes... code) {
  return ((1u << code) | ...);
}
constexpr uint32_t kTrellises =
    codes(PM_CODE_TRELLIS8, PM_CODE_TRELLIS6, PM_CODE_TRELLIS5, PM_CODE_TRELLIS4, PM_CODE_TRELLIS3);
constexpr uint32_t kAllCodes = kTrellises | codes(PM_CODE_MASK16, PM_CODE_ANGLE16, PM_CODE_TABLE8, PM_CODE_TABLE6);

struct Kernel {
  const char* name;    // arch_instruction and the tokens of a part
  int part_tokens;
  int partial_floats;  // of the sums of pieces of items, 0: cuts none
  int planned_slots;   // up to so many its launches make the plan themselves
  int min_capability;  // 10 * major + minor
  int max_capability;
  uint32_t codes;      // that it is built for
  // Launches one of the two products on as many blocks as the device holds at once.
  cudaError_t (*launch)(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream);
  // Kernels that multiply merged experts in e4m3 have this instead.
  cudaError_t (*launch_fp8)(int code, bool gate_up, const Fp8Gemm& gemm, cudaStream_t stream) = nullptr;
  const Kernel* dense = nullptr;  // for the dense experts, where mask16, whose decoder reads them, is not among codes

  bool takes(int code) const { return code >= 0 && code < 32 && codes >> code & 1; }
};

// The kernels of this library by number, from 0 on; null beyond the last.
int kernel_count();
const Kernel* find_kernel(int index);

// Kernel::launch of what Gemm and Tile make, built for kCodes alone.  Gemm<Code, Tile, kGateUp> has a kernel's
// kFunction and kSharedBytes.
template <template <class, class, bool> class Gemm, class Tile, uint32_t kCodes>
struct Launcher {
  template <class Product>
  static cudaError_t launch_product(const GroupedGemm& gemm, cudaStream_t stream) {
    return launch_resident<Product::kFunction, Tile::kThreads, Product::kSharedBytes>(gemm, stream);
  }

  template <int kCode, class Code>
  static cudaError_t launch_code(bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
    if constexpr (kCodes & codes(kCode))
      return gate_up ? launch_product<Gemm<Code, Tile, true>>(gemm, stream)
                     : launch_product<Gemm<Code, Tile, false>>(gemm, stream);
    else
      return cudaErrorInvalidValue;
  }

  static cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
    using Table8 = TableWords<8, Tile::kTableStride>;
    using Table6 = TableWords<6, Tile::kTableStride>;
    switch (code) {
      case PM_CODE_MASK16: return launch_code<PM_CODE_MASK16, Mask16>(gate_up, gemm, stream);
      case PM_CODE_ANGLE16: return launch_code<PM_CODE_ANGLE16, Angle16>(gate_up, gemm, stream);
      case PM_CODE_TABLE8: return launch_code<PM_CODE_TABLE8, Table8>(gate_up, gemm, stream);
      case PM_CODE_TABLE6: return launch_code<PM_CODE_TABLE6, Table6>(gate_up, gemm, stream);
      case PM_CODE_TRELLIS8: return launch_code<PM_CODE_TRELLIS8, TrellisWords<8>>(gate_up, gemm, stream);
      case PM_CODE_TRELLIS6: return launch_code<PM_CODE_TRELLIS6, TrellisWords<6>>(gate_up, gemm, stream);
      case PM_CODE_TRELLIS5: return launch_code<PM_CODE_TRELLIS5, TrellisWords<5>>(gate_up, gemm, stream);
      case PM_CODE_TRELLIS4: return launch_code<PM_CODE_TRELLIS4, TrellisWords<4>>(gate_up, gemm, stream);
      case PM_CODE_TRELLIS3: return launch_code<PM_CODE_TRELLIS3, TrellisWords<3>>(gate_up, gemm, stream);
    }
    return cudaErrorInvalidValue;
  }
};
