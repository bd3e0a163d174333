/* C interface of the CUDA library: the routed experts of one MoE layer, from packed expert pairs, and the encoder of
 * trellis words.
 *
 * No function synchronises with the host or launches anything that depends on the routing, so every call can be
 * captured into a CUDA graph.  Pointers are device pointers of the current device; matrices are row-major and
 * contiguous; every pointer is 16-byte aligned. */
#pragma once
#include <stdint.h>

#define PM_ABI_VERSION 10
#define PM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* How pair words are decoded; from TABLE8 on, with steps.  Words of 8 and 6 bits are looked up in a table; of a trellis,
 * by the bits of a word, values are computed from the words so far. */
enum {
  PM_CODE_MASK16,
  PM_CODE_ANGLE16,
  PM_CODE_TABLE8,
  PM_CODE_TABLE6,
  PM_CODE_TRELLIS8,
  PM_CODE_TRELLIS6,
  PM_CODE_TRELLIS5,
  PM_CODE_TRELLIS4,
  PM_CODE_TRELLIS3
};

/* P pairs and D dense experts; local expert 2p + position is that position of pair p, 2P + d is dense expert d.
 * Weights are in kernel order (see words.cuh); puzzlemoe_vllm/backends/cuda.py writes it. */
typedef struct {
  const void* x;              /* bf16 [tokens, hidden] */
  const float* topk_weights;  /* [tokens, topk] */
  const int32_t* topk_ids;    /* [tokens, topk], below 0: skip */
  const int32_t* expert_map;  /* [experts], local expert or -1; NULL: ids are local */
  const void* w13_pairs;      /* words of [pairs, 2 intermediate, hidden] */
  const void* w2_pairs;       /* words of [pairs, hidden, intermediate] */
  const void* w13_steps;      /* bf16 steps of w13_pairs, a row and group_size columns each; NULL without */
  const void* w2_steps;       /* those of w2_pairs */
  const void* table;          /* bf16 [256 or 64, 2], a word's value at position 0 and 1; NULL without */
  const void* w13_dense;      /* bf16 of [dense, 2 intermediate, hidden] */
  const void* w2_dense;       /* bf16 of [dense, hidden, intermediate] */
  void* out;                  /* bf16 [tokens, hidden] */
  void* scratch;              /* pm_scratch_bytes bytes */
  int32_t tokens, topk, hidden, intermediate, pairs, dense;
  int32_t code;               /* PM_CODE_* */
  int32_t group_size;         /* columns per step: 128, 64 or 32; 0 for codes without steps */
  int32_t kernel;             /* index below pm_kernel_count */
  /* Of the kernels that multiply in e4m3, as words_fp8.cuh says: the bytes of a word's level, of its direction at
   * position 0 and 1, and what their e4m3 values times a step are multiplied by, above 0. */
  uint8_t fp8_levels[8], fp8_directions[2][8];
  float fp8_unit;
} pm_layer;

PM_API int pm_abi_version(void);

/* Why the last call of this thread that returned non-zero failed. */
PM_API const char* pm_last_error(void);

/* The kernel variants that the caller may choose from; one that the device cannot run is an error at launch.  Names are
 * arch_instruction and the tokens of a part; those of sm90 are absent where their code was not to be trusted. */
PM_API int pm_kernel_count(void);
PM_API const char* pm_kernel_name(int kernel);
/* 1 if the current device can run that variant. */
PM_API int pm_kernel_runs(int kernel);
/* 1 if that variant is built for words of a code, PM_CODE_*. */
PM_API int pm_kernel_takes(int kernel, int code);
/* 1 if that variant quantises activations and multiplies merged experts in e4m3. */
PM_API int pm_kernel_is_fp8(int kernel);

/* Bytes of scratch that a call with these shapes and this kernel needs; -1 where that call would fail. */
PM_API int64_t pm_scratch_bytes(const pm_layer* layer);

/* out[m] = sum over local experts of topk_weights[m, k] * down(SiLU(gate x[m]) * up x[m]).  0, or an error. */
PM_API int pm_fused_experts(const pm_layer* layer, void* stream);

/* Bytes of scratch that pm_trellis_encode needs on the current device; -1 for bits that no code has. */
PM_API int64_t pm_trellis_scratch_bytes(int32_t bits, int64_t tiles);

/* Words of `bits` bits (8, 6, 5, 4, 3) of the trellis code, uint8 [tiles, 32 bits] as stored, whose values at both
 * positions are near the targets: little of the sum of weight * (value - target)^2.  targets, weights: [tiles, 256, 2]
 * in the order of the places.  0, or an error. */
PM_API int pm_trellis_encode(int32_t bits, const float* targets, const float* weights, int64_t tiles, uint8_t* words,
                             void* scratch, void* stream);

#ifdef __cplusplus
}
#endif
