#include "kernel.cuh"

extern const Kernel sm90_wgmma32 = sm90_kernel<Wgmma32>("sm90_wgmma32");
