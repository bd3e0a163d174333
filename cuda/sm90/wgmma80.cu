#include "kernel.cuh"

extern const Kernel sm90_wgmma80 = sm90_kernel<Wgmma80>("sm90_wgmma80");
