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
  int min_capability;  // 10 * major + minor
  int max_capability;
  uint32_t codes;      // that it is built for
  // Launches one of the two products on as many blocks as the device holds at once.
  cudaError_t (*launch)(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream);
  const Kernel* dense = nullptr;  // for the dense experts, where mask16, whose decoder reads them, is not among codes
  // Kernels that multiply merged experts in e4m3 have this instead of `launch`.
  cudaError_t (*launch_fp8)(int code, bool gate_up, const Fp8Gemm& gemm, cudaStream_t stream) = nullptr;

  bool takes(int code) const { return code >= 0 && code < 32 && codes >> code & 1; }
};

// The kernels of this library by number, from 0 on; null beyond the last.
int kernel_count();
const Kernel* find_kernel(int index);

template <class Code_>
struct OfCode {
  using Code = Code_;
};

template <uint32_t kCodes, int kCode, class Code, class Launch>
cudaError_t launch_if_built(Launch launch) {
  if constexpr (kCodes & codes(kCode)) return launch(OfCode<Code>());
  else return cudaErrorInvalidValue;
}

// launch(OfCode<Code>()) with the code of a number, if it is among kCodes; its table has Tile's stride.
template <class Tile, uint32_t kCodes, class Launch>
cudaError_t launch_code(int code, Launch launch) {
  switch (code) {
    case PM_CODE_MASK16: return launch_if_built<kCodes, PM_CODE_MASK16, Mask16>(launch);
    case PM_CODE_ANGLE16: return launch_if_built<kCodes, PM_CODE_ANGLE16, Angle16>(launch);
    case PM_CODE_TABLE8: return launch_if_built<kCodes, PM_CODE_TABLE8, TableWords<8, Tile::kTableStride>>(launch);
    case PM_CODE_TABLE6: return launch_if_built<kCodes, PM_CODE_TABLE6, TableWords<6, Tile::kTableStride>>(launch);
    case PM_CODE_TRELLIS8: return launch_if_built<kCodes, PM_CODE_TRELLIS8, TrellisWords<8>>(launch);
    case PM_CODE_TRELLIS6: return launch_if_built<kCodes, PM_CODE_TRELLIS6, TrellisWords<6>>(launch);
    case PM_CODE_TRELLIS5: return launch_if_built<kCodes, PM_CODE_TRELLIS5, TrellisWords<5>>(launch);
    case PM_CODE_TRELLIS4: return launch_if_built<kCodes, PM_CODE_TRELLIS4, TrellisWords<4>>(launch);
    case PM_CODE_TRELLIS3: return launch_if_built<kCodes, PM_CODE_TRELLIS3, TrellisWords<3>>(launch);
  }
  return cudaErrorInvalidValue;
}

// Kernel::launch of what Gemm and Tile make, built for kCodes alone.  Gemm<Code, Tile, kGateUp> has a kernel's
// kFunction and kSharedBytes.
template <template <class, class, bool> class Gemm, class Tile, uint32_t kCodes>
cudaError_t launch_product(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  return launch_code<Tile, kCodes>(code, [&](auto of) {
    using Code = typename decltype(of)::Code;
    using GateUp = Gemm<Code, Tile, true>;
    using Down = Gemm<Code, Tile, false>;
    return gate_up ? launch_resident<GateUp::kFunction, Tile::kThreads, GateUp::kSharedBytes>(gemm, stream)
                   : launch_resident<Down::kFunction, Tile::kThreads, Down::kSharedBytes>(gemm, stream);
  });
}
