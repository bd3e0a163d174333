// How kernels are launched: on how many blocks, and when.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

constexpr int kMaxDevices = 64;
constexpr int kMaxMultiprocessors = 256;  // of a device that a launch makes use of

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

// Whether the current device can start a kernel before the one ahead of it has ended: compute capability 9.0 and later.
inline bool starts_early() {
  int device, major;
  return !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
         major >= 9;
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
  config.numAttrs = starts_early();
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// The same on as many blocks as the current device holds at once.
template <auto kKernel, int kThreads, int kSharedBytes, class Parameter>
cudaError_t launch_resident(const Parameter& parameter, cudaStream_t stream) {
  static std::atomic<int> known[kMaxDevices];
  int blocks;
  if (cudaError_t error = resident_blocks(kKernel, kThreads, kSharedBytes, known, blocks)) return error;
  return launch_early(kKernel, blocks, kThreads, kSharedBytes, stream, parameter);
}
