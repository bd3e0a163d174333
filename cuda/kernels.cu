#include "kernels.cuh"

// Each is defined where its tile is.
extern const Kernel sm80_mma8, sm80_mma16, sm80_mma32, sm80_mma64;
extern const Kernel sm90_imma8, sm90_wgmma16, sm90_wgmma32, sm90_wgmma48, sm90_wgmma64, sm90_wgmma80, sm90_wgmma128;
extern const Kernel sm90_mma8, sm90_fp8_256;

namespace {

// PM_WITHOUT_SM90: the library is linked without the sources in sm90/, see build.py.
const Kernel* const kKernels[] = {
    &sm80_mma8,    &sm80_mma16,   &sm80_mma32,    &sm80_mma64,
#ifndef PM_WITHOUT_SM90
    &sm90_mma8,    &sm90_imma8,   &sm90_wgmma16,  &sm90_wgmma32, &sm90_wgmma48,
    &sm90_wgmma64, &sm90_wgmma80, &sm90_wgmma128, &sm90_fp8_256,
#endif
};

}  // namespace

int kernel_count() { return sizeof kKernels / sizeof *kKernels; }

const Kernel* find_kernel(int index) { return index >= 0 && index < kernel_count() ? kKernels[index] : nullptr; }
