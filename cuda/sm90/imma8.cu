#include "kernel.cuh"

extern const Kernel sm90_wgmma16;
static_assert(partial_floats<Imma8>() >= partial_floats<Wgmma16>(), "dense experts leave their sums in the same room");

extern const Kernel sm90_imma8{
    "sm90_imma8", Imma8::kPartTokens, partial_floats<Imma8>(), kFewSlots, 90, 90, kTrellises,
    Launcher<Sm90Product, Imma8, kTrellises>::launch, nullptr, &sm90_wgmma16};
