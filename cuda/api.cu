#include <cstdio>

#include "kernels.cuh"
#include "puzzlemoe.h"
#include "routing.cuh"
#include "trellis_encode.cuh"

namespace {

thread_local char last_error[256] = "";

int fail(const char* reason) {
  snprintf(last_error, sizeof last_error, "%s", reason);
  return 1;
}

// Hands out consecutive, 256-byte aligned pieces; of a null buffer, to learn the size.
struct Scratch {
  uint8_t* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
};

struct Workspace {
  Routing routing;
  __nv_bfloat16 *hidden, *slots;
  float4* partials;
  int64_t bytes;

  Workspace(const pm_layer& layer, const Kernel& kernel) {
    routing = {layer.topk_ids, layer.expert_map, layer.tokens * layer.topk, layer.topk, layer.pairs, layer.dense,
               nullptr, nullptr, nullptr, nullptr, nullptr};
    Scratch scratch{static_cast<uint8_t*>(layer.scratch)};
    routing.counts = scratch.take<int>(routing.experts());
    routing.sorted_slots = scratch.take<int>(routing.slots);
    routing.groups = scratch.take<TokenGroup>(routing.max_groups(kernel.part_tokens));
    routing.group_counts = scratch.take<int>(2);
    hidden = scratch.take<__nv_bfloat16>(int64_t(routing.slots) * layer.intermediate);
    slots = scratch.take<__nv_bfloat16>(int64_t(routing.slots) * layer.hidden);
    routing.arrivals = scratch.take<int>(kMaxArrivals);
    // Where rows are in no fixed order, a token's sums must not depend on where its item is cut.
    const bool cuts = kernel.partial_floats > 0 && routing.in_fixed_order();
    partials = cuts ? scratch.take<float4>(kernel.partial_floats / 4) : nullptr;
    bytes = scratch.used;
  }
};

// Gate and up, or down, of all groups.  Only mask16's decoder also reads dense experts: with the other codes they take
// a launch of their own.
cudaError_t multiply(const pm_layer& layer, const Kernel& kernel, const Workspace& work, bool gate_up,
                     cudaStream_t stream) {
  const int* counts = work.routing.group_counts;
  int group_shift = 0;
  while (32 << group_shift <= layer.group_size) ++group_shift;
  GroupedGemm gemm{static_cast<const uint8_t*>(gate_up ? layer.w13_pairs : layer.w2_pairs),
                   static_cast<const uint8_t*>(gate_up ? layer.w13_steps : layer.w2_steps),
                   static_cast<const uint32_t*>(layer.table),
                   static_cast<const uint8_t*>(gate_up ? layer.w13_dense : layer.w2_dense),
                   gate_up ? static_cast<const __nv_bfloat16*>(layer.x) : work.hidden,
                   gate_up ? work.hidden : work.slots,
                   work.routing.sorted_slots, work.routing.groups, nullptr, counts + 1,
                   work.partials, work.routing.arrivals, layer.topk, layer.pairs,
                   gate_up ? 2 * layer.intermediate : layer.hidden,
                   gate_up ? layer.hidden : layer.intermediate, group_shift};
  if (layer.code == PM_CODE_MASK16 || layer.dense == 0) return kernel.launch(layer.code, gate_up, gemm, stream);
  gemm.end_group = counts;
  cudaError_t error = layer.pairs ? kernel.launch(layer.code, gate_up, gemm, stream) : cudaSuccess;
  gemm.first_group = counts;
  gemm.end_group = counts + 1;
  return error ? error : kernel.launch(PM_CODE_MASK16, gate_up, gemm, stream);
}

}  // namespace

int pm_abi_version(void) { return PM_ABI_VERSION; }

const char* pm_last_error(void) { return last_error; }

int pm_kernel_count(void) { return kernel_count(); }

const char* pm_kernel_name(int kernel) {
  const Kernel* found = find_kernel(kernel);
  return found ? found->name : nullptr;
}

int pm_kernel_runs(int kernel) {
  const Kernel* found = find_kernel(kernel);
  int device, major, minor;
  if (!found || cudaGetDevice(&device) || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device))
    return 0;
  const int capability = 10 * major + minor;
  return found->min_capability <= capability && capability <= found->max_capability;
}

int64_t pm_scratch_bytes(const pm_layer* layer) {
  const Kernel* kernel = find_kernel(layer->kernel);
  return kernel ? Workspace(*layer, *kernel).bytes : 0;
}

int pm_fused_experts(const pm_layer* layer, void* stream_handle) {
  const Kernel* kernel = find_kernel(layer->kernel);
  if (!kernel) return fail("no such kernel");
  if (layer->hidden % 16 || layer->intermediate % 16) return fail("hidden and intermediate must be multiples of 16");
  if (2 * layer->pairs + layer->dense > kMaxExperts) return fail("more than 512 experts on one device");
  if (int64_t(layer->tokens) * layer->topk > INT32_MAX) return fail("more than 2^31 - 1 (token, expert) slots");
  if (layer->topk > 32) return fail("more than 32 experts per token");
  if (layer->code >= PM_CODE_TABLE8 && layer->group_size != 128 && layer->group_size != 64 && layer->group_size != 32)
    return fail("a code with steps needs group_size 128, 64 or 32");
  if (layer->code >= PM_CODE_TABLE8 && (layer->hidden % layer->group_size || layer->intermediate % layer->group_size))
    return fail("hidden and intermediate must be multiples of group_size");
  if (layer->tokens == 0) return 0;

  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Workspace work(*layer, *kernel);
  cudaError_t error = route(work.routing, kernel->part_tokens, stream);
  if (!error) error = multiply(*layer, *kernel, work, true, stream);
  if (!error) error = multiply(*layer, *kernel, work, false, stream);
  if (!error)
    error = combine(work.slots, layer->topk_weights, work.routing, static_cast<__nv_bfloat16*>(layer->out),
                    layer->tokens, layer->hidden, stream);
  if (error) {
    snprintf(last_error, sizeof last_error, "%s: %s", kernel->name, cudaGetErrorString(error));
    return 1;
  }
  return 0;
}

int64_t pm_trellis_scratch_bytes(int32_t bits, int64_t tiles) { return trellis_scratch_bytes(bits, tiles); }

int pm_trellis_encode(int32_t bits, const float* targets, const float* weights, int64_t tiles, uint8_t* words,
                      void* scratch, void* stream) {
  if (tiles < 0 || tiles > INT32_MAX) return fail("more than 2^31 - 1 tiles");
  if (tiles == 0) return 0;
  const cudaError_t error =
      trellis_encode(bits, reinterpret_cast<const float2*>(targets), reinterpret_cast<const float2*>(weights), tiles,
                     words, scratch, static_cast<cudaStream_t>(stream));
  return error ? fail(cudaGetErrorString(error)) : 0;
}
