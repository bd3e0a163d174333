#include "kernel.cuh"

extern const Kernel sm90_wgmma48 = sm90_kernel<Wgmma48>("sm90_wgmma48");
