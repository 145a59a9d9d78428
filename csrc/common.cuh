// What the kernels ask of the machine. With GRASP_EMULATE the same names are taken from emulate.hpp,
// which runs a grid on a CPU, so that a kernel's arithmetic and indexing are tested without a GPU.
#pragma once

#include <cstdint>

namespace grasp {
enum Kind : int { FLOAT = 0, BFLOAT = 1, HALF = 2 };  // of elements
}

#ifdef GRASP_EMULATE
#include "emulate.hpp"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")

namespace grasp {

using bf16 = __nv_bfloat16;
using fp16 = __half;

DEVICE void copy16(void* shared, const void* global, bool inside) {
  // Outside, nothing is read and 16 zero bytes are written.
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes));
}
DEVICE void write16(void* global, const void* shared) {
  *static_cast<uint4*>(global) = *static_cast<const uint4*>(shared);
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load4(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
DEVICE void load4_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

// D [16, 8] += A [16, 16] B [16, 8], fp32 sums.
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float shuffle(float x, int apart) { return __shfl_xor_sync(0xFFFFFFFFu, x, apart); }
DEVICE double shuffle(double x, int apart) { return __shfl_xor_sync(0xFFFFFFFFu, x, apart); }

DEVICE float widen(float x) { return x; }
DEVICE void round_to(float& to, float x) { to = x; }
DEVICE float widen(bf16 x) { return __bfloat162float(x); }
DEVICE float widen(fp16 x) { return __half2float(x); }
DEVICE void round_to(bf16& to, float x) { to = __float2bfloat16_rn(x); }
DEVICE void round_to(fp16& to, float x) { to = __float2half_rn(x); }

// The blocks of a cluster, each of which may look into the others' shared memory.
#if __CUDA_ARCH__ >= 900
DEVICE int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
DEVICE int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <typename T>
DEVICE T* of_rank(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
DEVICE int cluster_size() { return 1; }
DEVICE int cluster_rank() { return 0; }
DEVICE void cluster_sync() { __syncthreads(); }
template <typename T>
DEVICE T* of_rank(T* shared, int) {
  return shared;
}
#endif

}  // namespace grasp
#endif

namespace grasp {

// Two sums over a block of THREADS, in a fixed order, in thread 0; `scratch` has a pair for a warp.
template <int THREADS>
DEVICE void block_sums(float (&x)[2], float* scratch) {
  for (int i = 0; i < 2; ++i) {
    UNROLL
    for (int apart = 16; apart >= 1; apart /= 2) x[i] += shuffle(x[i], apart);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * 2 + i] = x[i];
  }
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < THREADS / 32; ++warp) {
    for (int i = 0; i < 2; ++i) x[i] += scratch[warp * 2 + i];
  }
}

// To what a strip had and lost so far; one thread owns it. An overflow is left out.
DEVICE void add_energy(float* energy, const float (&x)[2]) {
  if (!(x[0] <= 3.4e38f)) return;
  energy[0] += x[0];
  energy[1] += x[1];
}

}  // namespace grasp
