#include "kernel.cuh"

// Trellis words are left to sm90_wgmma64: those of three bits need more registers than there are.
extern const Kernel sm90_wgmma48 = sm90_kernel<Wgmma48, kAllCodes & ~kTrellises>("sm90_wgmma48");
