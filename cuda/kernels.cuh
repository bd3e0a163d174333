// The kernel variants that a caller may choose from.
#pragma once
#include <atomic>

#include "grouped.cuh"

constexpr int kMaxDevices = 64;

struct Kernel {
  const char* name;
  int part_tokens;
  bool splits;  // the depth of items: needs room for partial sums
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
  if (!error) known[device] = blocks = multiprocessors * per_multiprocessor;
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
