// wgmma in every width that is used, in bf16 and in e4m3: weights in registers, tokens in shared memory, accumulators
// four per 8 columns.
#pragma once
#include <cstdint>

// The operands of so many columns: the sums, their names in the instruction, and the names of what is multiplied.
#define PM_TILE(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PM_TWO_TILES(j) PM_TILE(j), PM_TILE(j + 1)

#define PM_SUMS_16 PM_TWO_TILES(0)
#define PM_SUMS_32 PM_SUMS_16, PM_TWO_TILES(2)
#define PM_SUMS_48 PM_SUMS_32, PM_TWO_TILES(4)
#define PM_SUMS_64 PM_SUMS_48, PM_TWO_TILES(6)
#define PM_SUMS_80 PM_SUMS_64, PM_TWO_TILES(8)
#define PM_SUMS_96 PM_SUMS_80, PM_TWO_TILES(10)
#define PM_SUMS_112 PM_SUMS_96, PM_TWO_TILES(12)
#define PM_SUMS_128 PM_SUMS_112, PM_TWO_TILES(14)
#define PM_SUMS_144 PM_SUMS_128, PM_TWO_TILES(16)
#define PM_SUMS_160 PM_SUMS_144, PM_TWO_TILES(18)
#define PM_SUMS_176 PM_SUMS_160, PM_TWO_TILES(20)
#define PM_SUMS_192 PM_SUMS_176, PM_TWO_TILES(22)
#define PM_SUMS_208 PM_SUMS_192, PM_TWO_TILES(24)
#define PM_SUMS_224 PM_SUMS_208, PM_TWO_TILES(26)
#define PM_SUMS_240 PM_SUMS_224, PM_TWO_TILES(28)
#define PM_SUMS_256 PM_SUMS_240, PM_TWO_TILES(30)

#define PM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PM_NAMES_32 PM_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PM_NAMES_48 PM_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PM_NAMES_64 PM_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PM_NAMES_80 PM_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PM_NAMES_96 PM_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PM_NAMES_112 PM_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PM_NAMES_128 PM_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PM_NAMES_144 PM_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PM_NAMES_160 PM_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PM_NAMES_176 PM_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PM_NAMES_192 PM_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PM_NAMES_208 PM_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PM_NAMES_224 PM_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define PM_NAMES_240 PM_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define PM_NAMES_256 PM_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define PM_FACTORS_16 "{%8, %9, %10, %11}, %12"
#define PM_FACTORS_32 "{%16, %17, %18, %19}, %20"
#define PM_FACTORS_48 "{%24, %25, %26, %27}, %28"
#define PM_FACTORS_64 "{%32, %33, %34, %35}, %36"
#define PM_FACTORS_80 "{%40, %41, %42, %43}, %44"
#define PM_FACTORS_96 "{%48, %49, %50, %51}, %52"
#define PM_FACTORS_128 "{%64, %65, %66, %67}, %68"
#define PM_FACTORS_160 "{%80, %81, %82, %83}, %84"
#define PM_FACTORS_192 "{%96, %97, %98, %99}, %100"
#define PM_FACTORS_224 "{%112, %113, %114, %115}, %116"
#define PM_FACTORS_256 "{%128, %129, %130, %131}, %132"

#define PM_WGMMA(name, columns, kind, flags) \
  template <> \
  __device__ __forceinline__ void name<columns>(float (&d)[columns / 8][4], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns kind " {" PM_NAMES_##columns "}, " PM_FACTORS_##columns \
                 ", " flags ";" \
                 : PM_SUMS_##columns \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define PM_WGMMA_BF16(columns) PM_WGMMA(wgmma_m64k16, columns, "k16.f32.bf16.bf16", "1, 1, 1, 0")
#define PM_WGMMA_E4M3(columns) PM_WGMMA(wgmma_m64k32_e4m3, columns, "k32.f32.e4m3.e4m3", "1, 1, 1")

// d[64 x kColumns] += a[64 x 16] b[16 x kColumns] in bf16.
template <int kColumns>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

PM_WGMMA_BF16(16)
PM_WGMMA_BF16(32)
PM_WGMMA_BF16(48)
PM_WGMMA_BF16(64)
PM_WGMMA_BF16(80)
PM_WGMMA_BF16(128)

// d[64 x kColumns] += a[64 x 32] b[32 x kColumns] in e4m3.
template <int kColumns>
__device__ __forceinline__ void wgmma_m64k32_e4m3(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

PM_WGMMA_E4M3(32)
PM_WGMMA_E4M3(64)
PM_WGMMA_E4M3(96)
PM_WGMMA_E4M3(128)
PM_WGMMA_E4M3(160)
PM_WGMMA_E4M3(192)
PM_WGMMA_E4M3(224)
PM_WGMMA_E4M3(256)
