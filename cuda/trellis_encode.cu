// Trellis words (puzzlemoe_vllm/format/codes/trellis.py) of given targets: Viterbi, by the minimum alone.
//
// A state of L bits belongs to the group of its upper L - b bits.  A place's cost of a group is the least over its 2^b
// states of the state's squared error and the cost of the group that the state's lower L - b bits name.  The inner loop
// keeps that minimum and not where it is: the costs before every place go to memory, and the way back looks at the 2^b
// states of one group a place.  All 256 places are kept: near ties are so many that survivors may meet only a hundred
// places back.  Costs of two tiles are one half2.  Each place subtracts the least cost of the one before, so that the
// differences that decide have nearly all of fp16's eleven bits.
//
// A tile is a cycle.  A pass over the last and first kSeam places, free at both ends, fixes the group between them; a
// second one goes from there round to there.
#include "trellis_encode.cuh"

#include <cuda_fp16.h>

#include "launch.cuh"

namespace {

constexpr int kPlaces = 256;
constexpr int kSeam = 48;
constexpr float kRootLimit = 90.5f;  // of the largest cost of a place: five of them are no infinity in fp16
constexpr uint32_t kMultiplier = 0x794298A3;
constexpr uint32_t kInfinity = 0x7C00;

// A state's values at both positions, each in both halves.
struct Values {
  __half2 low, high;
};

__device__ inline Values values_of(uint32_t product) {
  // In fp16, 0x6600 + v is 1536 + v.  The high bits stay where they are, which makes eight times the value.
  uint32_t low, high;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(low) : "r"(product & 0x1F1F1F1F), "r"(0x01010101), "r"(0x6600 - 62));
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(high) : "r"(product & 0xF8F8F8F8), "r"(0xFF01FF01), "r"(0x6600));
  const __half2 both = __halves2half2(__ushort_as_half(uint16_t(low)), __ushort_as_half(uint16_t(high)));
  const __half2 values = __hfma2(both, __floats2half2_rn(1.f, 0.125f), __floats2half2_rn(-1536.f, -192.f));
  return {__low2half2(values), __high2half2(values)};
}

template <int Bits, int Tiles>
struct Trellis {
  static constexpr int kStateBits = Bits == 3 ? 15 : 16;
  static constexpr int kGroupBits = kStateBits - Bits;
  static constexpr int kGroups = 1 << kGroupBits;
  static constexpr int kBranches = 1 << Bits;
  static constexpr int kPairs = Tiles / 2;  // half2 of a group
  // The states of kBranches groups have the same predecessors.  Where one warp does them all and rotated indices never
  // wrap within a word, the new costs replace the old.
  static constexpr bool kInPlace = Bits <= 4;
  static constexpr int kBuffers = kInPlace ? 1 : 2;
  static constexpr int kResidentThreads = Tiles == 16 ? 512 : 1024;  // of a multiprocessor: what registers allow
  static constexpr int kThreads = kGroups <= 1024 ? kGroups < 512 ? kGroups : kResidentThreads / 2 : kResidentThreads;
  static constexpr int kRounds = kGroups / kThreads;

  struct alignas(Tiles == 4 ? 8 : 16) Costs {
    __half2 of[kPairs];
  };
  // Of a place: roots of the weights, and what makes a value the root of its cost.
  struct alignas(16) Place {
    __half2 root[2][kPairs], shift[2][kPairs];
  };
  struct Shared {
    Place places[kPlaces];
    Costs costs[kBuffers][kGroups];
    uint32_t least[3][Tiles];  // of a place's costs, the bits of an fp16
    int seam[Tiles];           // the group between the last place and the first
    uint8_t words[Tiles][kPlaces];
  };
  static constexpr int64_t kHistoryBytes = int64_t(kPlaces) * kGroups * sizeof(Costs);

  __device__ static uint32_t rotated(uint32_t group, int by) {
    return (group << by | group >> (kGroupBits - by)) & (kGroups - 1);
  }
  // Groups with the same predecessors are neighbours in the history, which has the costs before every step of a pass.
  __device__ static uint32_t history_index(uint32_t group) { return rotated(group, Bits % kGroupBits); }
  __device__ static uint32_t history_group(uint32_t index) { return rotated(index, kGroupBits - Bits); }
};

// The tiles' targets and weights [256, 2] as halves, each tile scaled so that its largest cost fits.
template <int Bits, int Tiles>
__device__ void read_tiles(typename Trellis<Bits, Tiles>::Shared& shared, const float2* targets, const float2* weights,
                           int tiles) {
  using T = Trellis<Bits, Tiles>;
  const int lane = threadIdx.x % 32;
  for (int tile = threadIdx.x / 32; tile < Tiles; tile += T::kThreads / 32) {
    const bool inside = tile < tiles;
    float largest = 1e-30f;
    for (int place = lane; inside && place < kPlaces; place += 32) {
      const float2 x = targets[tile * kPlaces + place], w = weights[tile * kPlaces + place];
      largest = fmaxf(largest, hypotf(sqrtf(w.x) * (62.f + fabsf(x.x)), sqrtf(w.y) * (62.f + fabsf(x.y))));
    }
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = kRootLimit / fminf(largest, 1e38f);
    for (int place = lane; place < kPlaces; place += 32) {
      const float2 x = inside ? targets[tile * kPlaces + place] : float2{0.f, 0.f};
      const float2 w = inside ? weights[tile * kPlaces + place] : float2{0.f, 0.f};
      for (int position = 0; position < 2; ++position) {
        const __half root = __float2half_rn(sqrtf(position ? w.y : w.x) * scale);
        const __half shift = __float2half_rn(-(position ? x.y : x.x) * __half2float(root));
        reinterpret_cast<__half*>(shared.places[place].root[position])[tile] = root;
        reinterpret_cast<__half*>(shared.places[place].shift[position])[tile] = shift;
      }
    }
  }
}

// The least of the block's costs of every tile into `least`.
template <int Pairs>
__device__ void reduce_least(__half2 (&best)[Pairs], uint32_t* least) {
  const int lane = threadIdx.x % 32;
  int pair = 0, step = 16;
#pragma unroll
  for (int kept = Pairs / 2; kept; kept /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const __half2 given = upper ? best[i] : best[i + kept], mine = upper ? best[i + kept] : best[i];
      best[i] = __hmin2(mine, __shfl_xor_sync(~0u, given, step));
    }
    pair += upper ? kept : 0;
  }
  const int copies = 2 * step;
  for (; step; step /= 2) best[0] = __hmin2(best[0], __shfl_xor_sync(~0u, best[0], step));
  if (lane % copies == 0) {
    atomicMin(&least[2 * pair], uint32_t(__half_as_ushort(__low2half(best[0]))));
    atomicMin(&least[2 * pair + 1], uint32_t(__half_as_ushort(__high2half(best[0]))));
  }
}

// Costs after place `place`, the step-th of a pass, of those before it.
template <int Bits, int Tiles>
__device__ void advance(typename Trellis<Bits, Tiles>::Shared& shared, typename Trellis<Bits, Tiles>::Costs* history,
                        int step, int place) {
  using T = Trellis<Bits, Tiles>;
  const typename T::Place at = shared.places[place];
  const typename T::Costs* before = shared.costs[T::kInPlace ? 0 : step % 2];
  typename T::Costs* after = shared.costs[T::kInPlace ? 0 : (step + 1) % 2];
  typename T::Costs* kept = history + (step + 1) % kPlaces * T::kGroups;
  const int turn = T::kInPlace ? step * Bits % T::kGroupBits : 0;
  const uint32_t* least = shared.least[step % 3];
  if (threadIdx.x < Tiles) shared.least[(step + 2) % 3][threadIdx.x] = kInfinity;

  const __half2 infinity = __half2half2(__ushort_as_half(kInfinity));
  __half2 least_after[T::kPairs];
#pragma unroll
  for (int i = 0; i < T::kPairs; ++i) least_after[i] = infinity;
#pragma unroll 1
  for (int round = 0; round < T::kRounds; ++round) {
    // Lanes differ in a group's upper bits first: they read the same costs.
    const uint32_t index = round * T::kThreads + threadIdx.x;
    const uint32_t upper = index % T::kBranches, lower = index / T::kBranches;
    const uint32_t group = upper << (T::kGroupBits - Bits) | lower;
    const uint32_t from = T::kInPlace ? T::rotated(lower << Bits, turn) : lower << Bits;
    uint32_t product = (group << Bits) * kMultiplier;
    typename T::Costs best;
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) best.of[i] = infinity;
#pragma unroll 4
    for (uint32_t branch = 0; branch < T::kBranches; ++branch, product += kMultiplier) {
      const typename T::Costs past = before[from + (branch << turn)];
      const Values v = values_of(product);
#pragma unroll
      for (int i = 0; i < T::kPairs; ++i) {
        const __half2 low = __hfma2(v.low, at.root[0][i], at.shift[0][i]);
        const __half2 high = __hfma2(v.high, at.root[1][i], at.shift[1][i]);
        best.of[i] = __hmin2(best.of[i], __hfma2(high, high, __hfma2(low, low, past.of[i])));
      }
    }
#pragma unroll
    for (int i = 0; i < T::kPairs; ++i) {
      const uint32_t bits = least[2 * i] | least[2 * i + 1] << 16;
      best.of[i] = __hsub2(best.of[i], reinterpret_cast<const __half2&>(bits));
      least_after[i] = __hmin2(least_after[i], best.of[i]);
    }
    if (T::kInPlace) __syncwarp();
    after[T::kInPlace ? from + (upper << turn) : group] = best;
    kept[index] = best;
  }
  reduce_least(least_after, shared.least[(step + 1) % 3]);
  __syncthreads();
}

// The group of least cost after a step; all lanes of a warp get it.
template <int Bits, int Tiles>
__device__ uint32_t best_group(const typename Trellis<Bits, Tiles>::Costs* history, int step, int tile) {
  using T = Trellis<Bits, Tiles>;
  const __half* costs = reinterpret_cast<const __half*>(history + (step + 1) % kPlaces * T::kGroups) + tile;
  uint32_t least = ~0u;
#pragma unroll 8
  for (uint32_t index = threadIdx.x % 32; index < T::kGroups; index += 32)
    least = min(least, uint32_t(__half_as_ushort(costs[index * Tiles])) << 16 | index);
  return T::history_group(__reduce_min_sync(~0u, least) & 0xFFFF);
}

// The group before a step of the best path into `group` after it; all lanes of a warp get it.
template <int Bits, int Tiles>
__device__ uint32_t group_before(const typename Trellis<Bits, Tiles>::Shared& shared,
                                 const typename Trellis<Bits, Tiles>::Costs* history, int step, int place, int tile,
                                 uint32_t group) {
  using T = Trellis<Bits, Tiles>;
  const __half* costs = reinterpret_cast<const __half*>(history + step * T::kGroups) + tile;
  const auto of_tile = [tile](const __half2* of) { return __half2float(reinterpret_cast<const __half*>(of)[tile]); };
  const typename T::Place& at = shared.places[place];
  const float root0 = of_tile(at.root[0]), shift0 = of_tile(at.shift[0]);
  const float root1 = of_tile(at.root[1]), shift1 = of_tile(at.shift[1]);
  const uint32_t lane = threadIdx.x % 32;
  uint32_t least = ~0u, found = 0;
#pragma unroll
  for (uint32_t branch = lane; branch < (T::kBranches + 31) / 32 * 32; branch += 32) {
    const uint32_t state = group << Bits | branch % T::kBranches, before = state % T::kGroups;
    const Values v = values_of(state * kMultiplier);
    const float low = __low2float(v.low) * root0 + shift0, high = __low2float(v.high) * root1 + shift1;
    const float cost = low * low + high * high + __half2float(costs[T::history_index(before) * Tiles]);
    if (__float_as_uint(cost) < least) least = __float_as_uint(cost), found = before;
  }
  const uint32_t winner = __ballot_sync(~0u, least == __reduce_min_sync(~0u, least));
  return __shfl_sync(~0u, found, __ffs(winner) - 1);
}

// Costs before the first step of a pass: none, or none for the group at the seam alone.
template <int Bits, int Tiles>
__device__ void start(typename Trellis<Bits, Tiles>::Shared& shared, bool at_seam) {
  using T = Trellis<Bits, Tiles>;
  __half* costs = reinterpret_cast<__half*>(shared.costs[0]);
  for (int i = threadIdx.x; i < T::kGroups * Tiles; i += T::kThreads) {
    const bool open = !at_seam || i / Tiles == shared.seam[i % Tiles];
    costs[i] = __ushort_as_half(open ? 0 : kInfinity);
  }
  if (threadIdx.x < Tiles) {
    shared.least[0][threadIdx.x] = 0;
    shared.least[1][threadIdx.x] = kInfinity;
  }
  __syncthreads();
}

// Words of a byte each to the stream, lowest bits first.
template <int Bits, int Tiles>
__device__ void write_tiles(const typename Trellis<Bits, Tiles>::Shared& shared, uint8_t* out, int tiles) {
  for (int eight = threadIdx.x; eight < min(tiles, Tiles) * kPlaces / 8; eight += Trellis<Bits, Tiles>::kThreads) {
    uint64_t stream = 0;
    for (int i = 0; i < 8; ++i) stream |= uint64_t((&shared.words[0][0])[8 * eight + i]) << Bits * i;
    for (int i = 0; i < Bits; ++i) out[eight * Bits + i] = uint8_t(stream >> 8 * i);
  }
}

// targets, weights: [tiles, 256, 2]; out: [tiles, 32 Bits]; histories: one of Trellis::kHistoryBytes for each block.
template <int Bits, int Tiles>
__global__ void __launch_bounds__(Trellis<Bits, Tiles>::kThreads,
                                  Trellis<Bits, Tiles>::kResidentThreads / Trellis<Bits, Tiles>::kThreads)
    trellis_encode_kernel(const float2* targets, const float2* weights, int tiles, uint8_t* out, uint8_t* histories) {
  using T = Trellis<Bits, Tiles>;
  extern __shared__ __align__(16) uint8_t dynamic[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(dynamic);
  auto* history = reinterpret_cast<typename T::Costs*>(histories + blockIdx.x * T::kHistoryBytes);
  constexpr int kWarps = T::kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int64_t first = int64_t(blockIdx.x) * Tiles; first < tiles; first += int64_t(gridDim.x) * Tiles) {
    const int left = int(tiles - first);
    read_tiles<Bits, Tiles>(shared, targets + first * kPlaces, weights + first * kPlaces, left);
    start<Bits, Tiles>(shared, false);
    for (int step = 0; step < 2 * kSeam; ++step)
      advance<Bits, Tiles>(shared, history, step, (step - kSeam) & (kPlaces - 1));
    for (int tile = warp; tile < Tiles; tile += kWarps) {
      uint32_t group = best_group<Bits, Tiles>(history, 2 * kSeam - 1, tile);
      for (int step = 2 * kSeam - 1; step >= kSeam; --step)
        group = group_before<Bits, Tiles>(shared, history, step, step - kSeam, tile, group);
      if (lane == 0) shared.seam[tile] = group;
    }
    __syncthreads();

    start<Bits, Tiles>(shared, true);
    for (int place = 0; place < kPlaces; ++place) advance<Bits, Tiles>(shared, history, place, place);
    for (int tile = warp; tile < Tiles; tile += kWarps) {
      uint32_t group = shared.seam[tile];
      for (int place = kPlaces - 1;; --place) {
        if (lane == 0) shared.words[tile][place] = uint8_t(group >> (T::kGroupBits - Bits));
        if (place == 0) break;
        group = group_before<Bits, Tiles>(shared, history, place, place, tile, group);
      }
    }
    __syncthreads();
    write_tiles<Bits, Tiles>(shared, out + first * 32 * Bits, left);
    __syncthreads();
  }
}

// A kernel for words of so many bits, so many tiles to a block.
struct Encoder {
  int bits, tiles, threads, shared_bytes;
  int64_t history_bytes;
  void (*kernel)(const float2*, const float2*, int, uint8_t*, uint8_t*);
};

template <int Bits, int Tiles>
constexpr Encoder encoder() {
  using T = Trellis<Bits, Tiles>;
  return {Bits, Tiles, T::kThreads, sizeof(typename T::Shared), T::kHistoryBytes, trellis_encode_kernel<Bits, Tiles>};
}

// With small words 16 tiles are hardly faster than 8, and their history takes 4 GB.
constexpr Encoder kEncoders[] = {
    encoder<8, 16>(), encoder<8, 8>(), encoder<8, 4>(), encoder<6, 16>(), encoder<6, 8>(), encoder<6, 4>(),
    encoder<5, 16>(), encoder<5, 8>(), encoder<5, 4>(), encoder<4, 8>(),  encoder<4, 4>(), encoder<3, 8>(),
    encoder<3, 4>(),
};
std::atomic<int> resident[sizeof kEncoders / sizeof *kEncoders][kMaxDevices];

struct Launch {
  const Encoder* encoder = nullptr;
  int blocks = 0;
};

// Tiles share the values of states: as many to a block as its memory holds, and as leave no multiprocessor idle.
cudaError_t choose(int bits, int64_t tiles, Launch& chosen) {
  int device, multiprocessors, shared_bytes;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) return error;
  for (const Encoder& encoder : kEncoders) {
    if (encoder.bits != bits || encoder.shared_bytes > shared_bytes) continue;
    int blocks;
    error = resident_blocks(encoder.kernel, encoder.threads, encoder.shared_bytes, resident[&encoder - kEncoders],
                            blocks);
    if (error) return error;
    const int64_t wanted = (tiles + encoder.tiles - 1) / encoder.tiles;
    chosen = {&encoder, int(std::min<int64_t>(blocks, wanted))};
    if (wanted >= multiprocessors) break;
  }
  return chosen.encoder ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int64_t trellis_scratch_bytes(int bits, int64_t tiles) {
  Launch launch;
  return choose(bits, tiles, launch) ? -1 : launch.blocks * launch.encoder->history_bytes;
}

cudaError_t trellis_encode(int bits, const float2* targets, const float2* weights, int64_t tiles, uint8_t* words,
                           void* scratch, cudaStream_t stream) {
  Launch launch;
  const cudaError_t error = choose(bits, tiles, launch);
  if (error) return error;
  const Encoder& encoder = *launch.encoder;
  encoder.kernel<<<launch.blocks, encoder.threads, encoder.shared_bytes, stream>>>(
      targets, weights, int(tiles), words, static_cast<uint8_t*>(scratch));
  return cudaGetLastError();
}
