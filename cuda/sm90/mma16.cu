#include "kernel.cuh"

// Of other words sm90_wgmma16 is as fast.
extern const Kernel sm90_mma16 = sm90_kernel<Mma16, kTrellises | codes(PM_CODE_MASK16)>("sm90_mma16");
