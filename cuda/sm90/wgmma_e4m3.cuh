// d[64 x kColumns] += a[64 x 32] b[32 x kColumns] in e4m3; a in registers, accumulators four per 8 columns.
#pragma once
#include <cstdint>

#define PM_SUMS_1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PM_SUMS_4(j) PM_SUMS_1(j), PM_SUMS_1(j + 1), PM_SUMS_1(j + 2), PM_SUMS_1(j + 3)
#define PM_SUMS_8(j) PM_SUMS_4(j), PM_SUMS_4(j + 4)
#define PM_SUMS_16(j) PM_SUMS_8(j), PM_SUMS_8(j + 8)

#define PM_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PM_NAMES_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PM_NAMES_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PM_NAMES_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PM_NAMES_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PM_NAMES_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PM_NAMES_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define PM_NAMES_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define PM_WGMMA_E4M3(columns, sums, names, a, b) \
  template <> \
  __device__ __forceinline__ void wgmma_m64k32_e4m3<columns>(float (&d)[columns / 8][4], const uint32_t (&A)[4], \
                                                             uint64_t B) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 {" names "}, {" a "}, " b ", 1, 1, 1;" \
                 : sums \
                 : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "l"(B)); \
  }

template <int kColumns>
__device__ __forceinline__ void wgmma_m64k32_e4m3(float (&d)[kColumns / 8][4], const uint32_t (&A)[4], uint64_t B);

#define PM_ALL_SUMS_32 PM_SUMS_4(0)
#define PM_ALL_SUMS_64 PM_SUMS_8(0)
#define PM_ALL_SUMS_96 PM_SUMS_8(0), PM_SUMS_4(8)
#define PM_ALL_SUMS_128 PM_SUMS_16(0)
#define PM_ALL_SUMS_160 PM_SUMS_16(0), PM_SUMS_4(16)
#define PM_ALL_SUMS_192 PM_SUMS_16(0), PM_SUMS_8(16)
#define PM_ALL_SUMS_224 PM_SUMS_16(0), PM_SUMS_8(16), PM_SUMS_4(24)
#define PM_ALL_SUMS_256 PM_SUMS_16(0), PM_SUMS_16(16)
#define PM_NAMES_OF_32 PM_NAMES_0
#define PM_NAMES_OF_64 PM_NAMES_0 ", " PM_NAMES_1
#define PM_NAMES_OF_96 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2
#define PM_NAMES_OF_128 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2 ", " PM_NAMES_3
#define PM_NAMES_OF_160 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2 ", " PM_NAMES_3 ", " PM_NAMES_4
#define PM_NAMES_OF_192 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2 ", " PM_NAMES_3 ", " PM_NAMES_4 ", " PM_NAMES_5
#define PM_NAMES_OF_224 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2 ", " PM_NAMES_3 ", " PM_NAMES_4 ", " PM_NAMES_5 ", " PM_NAMES_6
#define PM_NAMES_OF_256 PM_NAMES_0 ", " PM_NAMES_1 ", " PM_NAMES_2 ", " PM_NAMES_3 ", " PM_NAMES_4 ", " PM_NAMES_5 ", " PM_NAMES_6 ", " PM_NAMES_7
PM_WGMMA_E4M3(32, PM_ALL_SUMS_32, PM_NAMES_OF_32, "%16, %17, %18, %19", "%20")
PM_WGMMA_E4M3(64, PM_ALL_SUMS_64, PM_NAMES_OF_64, "%32, %33, %34, %35", "%36")
PM_WGMMA_E4M3(96, PM_ALL_SUMS_96, PM_NAMES_OF_96, "%48, %49, %50, %51", "%52")
PM_WGMMA_E4M3(128, PM_ALL_SUMS_128, PM_NAMES_OF_128, "%64, %65, %66, %67", "%68")
PM_WGMMA_E4M3(160, PM_ALL_SUMS_160, PM_NAMES_OF_160, "%80, %81, %82, %83", "%84")
PM_WGMMA_E4M3(192, PM_ALL_SUMS_192, PM_NAMES_OF_192, "%96, %97, %98, %99", "%100")
PM_WGMMA_E4M3(224, PM_ALL_SUMS_224, PM_NAMES_OF_224, "%112, %113, %114, %115", "%116")
PM_WGMMA_E4M3(256, PM_ALL_SUMS_256, PM_NAMES_OF_256, "%128, %129, %130, %131", "%132")
