#include "kernel.cuh"

extern const Kernel sm90_wgmma16 = sm90_kernel<Wgmma16>("sm90_wgmma16");
