// Lets a header of plain arithmetic be compiled by nvcc for kernels and by any C++17 compiler for a test.
#pragma once
#ifdef __CUDACC__
#define PM_HOST_DEVICE __host__ __device__
#else
#define PM_HOST_DEVICE
#endif

// Tells the compiler that all lanes of the warp hold the same value.
PM_HOST_DEVICE inline int uniform(int value) {
#ifdef __CUDA_ARCH__
  return __shfl_sync(~0u, value, 0);
#else
  return value;
#endif
}
