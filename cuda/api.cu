#include <algorithm>
#include <cstdio>
#include <cstring>

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

// Why a layer cannot be multiplied with a kernel, or null when it can.
const char* refusal(const pm_layer& layer, const Kernel* kernel) {
  if (!kernel) return "no such kernel";
  if (!kernel->takes(layer.code)) return "that kernel is not built for words of this code";
  if (kernel->launch_fp8 && !(layer.fp8_unit > 0)) return "these words have no values in e4m3";
  if (layer.tokens < 0 || layer.topk < 0 || layer.pairs < 0 || layer.dense < 0) return "a size is below 0";
  if (layer.hidden <= 0 || layer.intermediate <= 0) return "hidden and intermediate must be above 0";
  if (layer.hidden % 16 || layer.intermediate % 16) return "hidden and intermediate must be multiples of 16";
  if (2 * int64_t(layer.pairs) + layer.dense > kMaxExperts) return "more than 512 experts on one device";
  if (int64_t(layer.tokens) * layer.topk > INT32_MAX) return "more than 2^31 - 1 (token, expert) slots";
  if (layer.topk > 32) return "more than 32 experts per token";
  if (kernel->launch_fp8 && std::max(layer.hidden, layer.intermediate) > kFp8MaxDepth)
    return "e4m3 kernels take no hidden or intermediate size above 65536";
  if (layer.code < PM_CODE_TABLE8) return nullptr;
  if (layer.group_size != 128 && layer.group_size != 64 && layer.group_size != 32)
    return "a code with steps needs group_size 128, 64 or 32";
  if (layer.hidden % layer.group_size || layer.intermediate % layer.group_size)
    return "hidden and intermediate must be multiples of group_size";
  return nullptr;
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
  uint64_t* arrivals;
  Fp8Plan fp8;
  int64_t bytes;

  Workspace(const pm_layer& layer, const Kernel& kernel) {
    routing = {layer.topk_ids, layer.expert_map, layer.tokens * layer.topk, layer.topk, layer.pairs, layer.dense,
               nullptr, nullptr, nullptr, nullptr};
    Scratch scratch{static_cast<uint8_t*>(layer.scratch)};
    routing.counts = scratch.take<int>(routing.experts());
    routing.sorted_slots = scratch.take<int>(routing.slots);
    routing.groups = scratch.take<TokenGroup>(routing.max_groups(kernel.part_tokens));
    routing.group_counts = scratch.take<int>(2);
    hidden = scratch.take<__nv_bfloat16>(int64_t(routing.slots) * layer.intermediate);
    slots = scratch.take<__nv_bfloat16>(int64_t(routing.slots) * layer.hidden);
    arrivals = scratch.take<uint64_t>(kMaxArrivals);
    // Where rows are in no fixed order, a token's sums must not depend on where its item is cut.
    const bool cuts = kernel.partial_floats > 0 && routing.in_fixed_order();
    partials = cuts ? scratch.take<float4>(kernel.partial_floats / 4) : nullptr;
    if (kernel.launch_fp8) {
      fp8.experts = 2 * layer.pairs, fp8.slot_count = routing.slots;
      fp8.tiles = scratch.take<TokenGroup>(fp8.max_tiles());
      fp8.tile_count = scratch.take<int>(1);
      fp8.rows = scratch.take<uint8_t>(fp8.row_bytes(std::max(layer.hidden, layer.intermediate)));
      fp8.scales = scratch.take<float>(fp8.padded());
      fp8.slots = scratch.take<int>(fp8.padded());
    }
    bytes = scratch.used;
  }
};

GroupedGemm product(const pm_layer& layer, const Workspace& work, bool gate_up) {
  int group_shift = 0;
  while (32 << group_shift <= layer.group_size) ++group_shift;
  return {static_cast<const uint8_t*>(gate_up ? layer.w13_pairs : layer.w2_pairs),
          static_cast<const uint8_t*>(gate_up ? layer.w13_steps : layer.w2_steps),
          static_cast<const uint32_t*>(layer.table),
          static_cast<const uint8_t*>(gate_up ? layer.w13_dense : layer.w2_dense),
          gate_up ? static_cast<const __nv_bfloat16*>(layer.x) : work.hidden,
          gate_up ? work.hidden : work.slots,
          work.routing.group_counts, work.routing.groups, work.routing.sorted_slots, work.partials, work.arrivals,
          layer.topk, layer.pairs,
          gate_up ? 2 * layer.intermediate : layer.hidden,
          gate_up ? layer.hidden : layer.intermediate, group_shift, false, false};
}

// Gate and up, or down, of the dense experts' groups alone.
cudaError_t multiply_dense(const Kernel& kernel, GroupedGemm gemm, bool gate_up, cudaStream_t stream) {
  gemm.skips_pairs = true;
  return kernel.launch(PM_CODE_MASK16, gate_up, gemm, stream);
}

// Gate and up, or down, of all groups.  Only mask16's decoder also reads dense experts: with the other codes they take
// a launch of their own.
cudaError_t multiply(const pm_layer& layer, const Kernel& kernel, const Workspace& work, bool gate_up,
                     cudaStream_t stream) {
  GroupedGemm gemm = product(layer, work, gate_up);
  if (layer.code == PM_CODE_MASK16 || layer.dense == 0) return kernel.launch(layer.code, gate_up, gemm, stream);
  gemm.skips_dense = true;
  cudaError_t error = layer.pairs ? kernel.launch(layer.code, gate_up, gemm, stream) : cudaSuccess;
  gemm.skips_dense = false;
  return error ? error : multiply_dense(kernel.dense ? *kernel.dense : kernel, gemm, gate_up, stream);
}

// The same where merged experts multiply in e4m3, with the pass that quantises their tokens.
cudaError_t multiply_fp8(const pm_layer& layer, const Kernel& kernel, const Workspace& work, bool gate_up,
                         cudaStream_t stream) {
  const GroupedGemm all = product(layer, work, gate_up);
  cudaError_t error = layer.dense ? multiply_dense(*kernel.dense, all, gate_up, stream) : cudaSuccess;
  if (error || layer.pairs == 0) return error;
  error = quantise(all.activations, all.depth, !gate_up, work.routing, work.fp8, stream);
  if (error) return error;
  Fp8Gemm gemm{all, work.fp8.rows, work.fp8.scales, work.fp8.slots, work.fp8.padded(), {}, layer.fp8_unit};
  memcpy(&gemm.sums.levels, layer.fp8_levels, 8);
  memcpy(&gemm.sums.directions, layer.fp8_directions, 16);
  gemm.groups = work.fp8.tiles;
  gemm.group_counts = work.fp8.tile_count;
  gemm.skips_dense = true;
  return kernel.launch_fp8(layer.code, gate_up, gemm, stream);
}

cudaError_t multiply_both(const pm_layer& layer, const Kernel& kernel, const Workspace& work, cudaStream_t stream) {
  if (!kernel.launch_fp8) {
    const cudaError_t error = multiply(layer, kernel, work, true, stream);
    return error ? error : multiply(layer, kernel, work, false, stream);
  }
  cudaError_t error = layer.pairs ? plan_fp8(work.routing, work.fp8, stream) : cudaSuccess;
  if (!error) error = multiply_fp8(layer, kernel, work, true, stream);
  return error ? error : multiply_fp8(layer, kernel, work, false, stream);
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

int pm_kernel_takes(int kernel, int code) {
  const Kernel* found = find_kernel(kernel);
  return found && found->takes(code);
}

int pm_kernel_is_fp8(int kernel) {
  const Kernel* found = find_kernel(kernel);
  return found && found->launch_fp8;
}

int64_t pm_scratch_bytes(const pm_layer* layer) {
  const Kernel* kernel = find_kernel(layer->kernel);
  if (const char* reason = refusal(*layer, kernel)) return fail(reason), -1;
  return Workspace(*layer, *kernel).bytes;
}

int pm_fused_experts(const pm_layer* layer, void* stream_handle) {
  const Kernel* kernel = find_kernel(layer->kernel);
  if (const char* reason = refusal(*layer, kernel)) return fail(reason);
  if (layer->tokens == 0) return 0;

  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Workspace work(*layer, *kernel);
  cudaError_t error = route(work.routing, kernel->part_tokens, stream);
  if (!error) error = multiply_both(*layer, *kernel, work, stream);
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
