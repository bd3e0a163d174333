#include "kernel.cuh"

extern const Kernel sm90_wgmma128 = sm90_kernel<Wgmma128>("sm90_wgmma128");
