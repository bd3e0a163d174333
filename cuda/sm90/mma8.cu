#include "../kernels.cuh"
#include "warp_gemm.cuh"

namespace {

// Those of trellis words, which take more instructions, are Imma8's.
constexpr uint32_t kCodes = codes(PM_CODE_MASK16, PM_CODE_ANGLE16, PM_CODE_TABLE8, PM_CODE_TABLE6);

template <class Code, class, bool kGateUp>
struct Gemm {
  static constexpr auto kFunction = warp_gemm<Code, kGateUp>;
  static constexpr int kSharedBytes = WarpGemm<Code, kGateUp>::kSharedBytes;
};

}  // namespace

extern const Kernel sm90_mma8{
    "sm90_mma8", WarpTile::kPartTokens, 0, 90, 90, kCodes, launch_product<Gemm, WarpTile, kCodes>};
