#include "kernel.cuh"

extern const Kernel sm90_wgmma64 = sm90_kernel<Wgmma64>("sm90_wgmma64");
