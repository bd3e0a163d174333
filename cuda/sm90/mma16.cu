#include "kernel.cuh"

extern const Kernel sm90_mma16 = sm90_kernel<Mma16>("sm90_mma16");
