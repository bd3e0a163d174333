// The kernel variants that a caller may choose from.
#pragma once
#include <algorithm>
#include <atomic>

#include "grouped.cuh"
#include "puzzlemoe.h"

constexpr int kMaxDevices = 64;

struct Kernel {
  const char* name;
  int part_tokens;
  int partial_floats;  // of the sums of pieces of items, 0: cuts none
  int min_capability;  // 10 * major + minor
  int max_capability;
  // Launches one of the two products on as many blocks as the device holds at once.
  cudaError_t (*launch)(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream);
};

extern const Kernel kMmaKernels[];
extern const int kMmaKernelCount;
extern const Kernel kHopperKernels[];
extern const int kHopperKernelCount;

// Blocks of `kernel` that the current device holds at once; asked of the driver once per device.  Raises the kernel's
// shared memory limit on the way.
template <class Function>
cudaError_t resident_blocks(Function kernel, int threads, int shared_bytes, std::atomic<int> (&known)[kMaxDevices],
                            int& blocks) {
  int device, multiprocessors, per_multiprocessor;
  cudaError_t error = cudaGetDevice(&device);
  if (error) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if ((blocks = known[device])) return cudaSuccess;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes);
  if (!error && per_multiprocessor == 0) error = cudaErrorLaunchOutOfResources;
  if (!error) known[device] = blocks = std::min(multiprocessors, kMaxMultiprocessors) * per_multiprocessor;
  return error;
}

// Launches a kernel that may start before the one ahead of it in the stream has ended, where the device can do that;
// the kernel itself waits before it uses that one's results.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, cudaStream_t stream,
                         Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Launches one of the two products of one code.  Gemm<Code, Tile, kGateUp> has a kernel's kFunction and kSharedBytes.
template <template <class, class, bool> class Gemm, class Code, class Tile, bool kGateUp>
cudaError_t launch_product(const GroupedGemm& gemm, cudaStream_t stream) {
  using Product = Gemm<Code, Tile, kGateUp>;
  static std::atomic<int> known[kMaxDevices];
  int blocks;
  if (cudaError_t error =
          resident_blocks(Product::kFunction, Tile::kThreads, Product::kSharedBytes, known, blocks))
    return error;
  return launch_early(Product::kFunction, blocks, Tile::kThreads, Product::kSharedBytes, stream, gemm);
}

template <template <class, class, bool> class Gemm, class Code, class Tile>
cudaError_t launch_code(bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  return gate_up ? launch_product<Gemm, Code, Tile, true>(gemm, stream)
                 : launch_product<Gemm, Code, Tile, false>(gemm, stream);
}

// Kernel::launch of the kernels that Gemm and Tile make.
template <template <class, class, bool> class Gemm, class Tile>
cudaError_t launch(int code, bool gate_up, const GroupedGemm& gemm, cudaStream_t stream) {
  switch (code) {
    case PM_CODE_MASK16: return launch_code<Gemm, Mask16, Tile>(gate_up, gemm, stream);
    case PM_CODE_ANGLE16: return launch_code<Gemm, Angle16, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE8: return launch_code<Gemm, TableWords<8, Tile::kTableStride>, Tile>(gate_up, gemm, stream);
    case PM_CODE_TABLE6: return launch_code<Gemm, TableWords<6, Tile::kTableStride>, Tile>(gate_up, gemm, stream);
  }
  return cudaErrorInvalidValue;
}
