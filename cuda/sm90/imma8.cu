#include "kernel.cuh"

extern const Kernel sm90_wgmma16;
static_assert(partial_floats<Imma8>() >= partial_floats<Wgmma16>(), "dense experts leave their sums in the same room");

extern const Kernel sm90_imma8{
    "sm90_imma8", Imma8::kPartTokens, partial_floats<Imma8>(), 90, 90, kTrellises,
    launch_product<Sm90Product, Imma8, kTrellises>, &sm90_wgmma16};
