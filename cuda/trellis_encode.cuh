// The words of the trellis codes whose values are near given targets.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// Bytes of scratch for so many tiles on the current device; -1 where no kernel has words of so many bits.
int64_t trellis_scratch_bytes(int bits, int64_t tiles);

// targets, weights of squared errors: [tiles, 256], x and y the two positions; words: [tiles, 32 bits].
cudaError_t trellis_encode(int bits, const float2* targets, const float2* weights, int64_t tiles, uint8_t* words,
                           void* scratch, cudaStream_t stream);
