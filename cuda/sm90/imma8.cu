#include <type_traits>

#include "kernel.cuh"

namespace {

// Dense experts are multiplied in bf16.
template <class Code, class Tile, bool kGateUp>
using Product = Sm90Product<Code, std::conditional_t<Code::kReadsDense, Mma8, Tile>, kGateUp>;

constexpr uint32_t kCodes = kTrellises | codes(PM_CODE_MASK16);

}  // namespace

extern const Kernel sm90_imma8 = {"sm90_imma8", Imma8::kPartTokens, partial_floats<Imma8>(), 90, 90, kCodes,
                                  Launcher<Product, Imma8, kCodes>::launch};
