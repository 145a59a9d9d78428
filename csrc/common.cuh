// What the kernels ask of the machine. With GRASP_EMULATE the same names are taken from
// emulate.hpp, which runs a grid on a CPU, so that kernels are tested without a GPU.
#pragma once

#include <cstdint>

#include "job.h"

#ifdef GRASP_EMULATE
#include "emulate.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")

namespace grasp {

using bf16 = __nv_bfloat16;
using fp16 = __half;

DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers in shared memory (mbarrier). A phase ends when `count` have arrived and all bytes that
// were announced have come; phases alternate in parity.
DEVICE void flag_init(uint64_t* flag, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(flag)), "r"(count));
}
DEVICE void flags_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void flag_arrive(uint64_t* flag) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(flag)) : "memory");
}
// Arrives, and announces bytes that come on their own.
DEVICE void flag_expect(uint64_t* flag, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(flag)),
               "r"(bytes)
               : "memory");
}
DEVICE void flag_wait(uint64_t* flag, int parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(shared_address(flag)), "r"(parity)
        : "memory");
  }
}
// For what other blocks sent.
DEVICE void flag_wait_for_cluster(uint64_t* flag, int parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(shared_address(flag)), "r"(parity)
        : "memory");
  }
}
DEVICE bool flag_ended(uint64_t* flag, int parity) {
  uint32_t ended;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(ended)
      : "r"(shared_address(flag)), "r"(parity)
      : "memory");
  return ended;
}

// Bulk copies, in multiples of 16 bytes. The copy engine sees what threads wrote to shared memory
// after `fence_for_bulk` in each of them.
DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* flag) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(flag))
      : "memory");
}
DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read (`bulk_read`), or the stores of this thread are done.
DEVICE void bulk_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void bulk_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
DEVICE void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes, or 16 zero bytes where nothing is to be read; `copies_arrive` makes the thread arrive
// at the flag when all its copies so far have come.
DEVICE void copy16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
DEVICE void copies_arrive(uint64_t* flag) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(flag))
               : "memory");
}
DEVICE void write16(void* global, uint4 x) { *static_cast<uint4*>(global) = x; }

// The blocks of a cluster write into each other's shared memory, counted by a flag there.
using Remote = uint32_t;
DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE Remote of_rank(const void* shared, int rank) {
  Remote there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(shared)), "r"(rank));
  return there;
}
DEVICE void send16(Remote to, uint4 x, Remote flag) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(flag)
      : "memory");
}
DEVICE void send4(Remote to, float x, Remote flag) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
      "r"(__float_as_uint(x)), "r"(flag)
      : "memory");
}
DEVICE float fetch(Remote from) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

template <int THREADS>
DEVICE void sync_first_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// The same answer in each: whether all of them say yes.
template <int THREADS>
DEVICE bool all_of_first_threads(bool yes) {
  uint32_t all;
  asm volatile(
      "{.reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.and.pred q, 1, %2, p; selp.u32 %0, 1, 0, q;}"
      : "=r"(all)
      : "r"(uint32_t(yes)), "n"(THREADS)
      : "memory");
  return all;
}

// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32 bits; lane i gives the address of row
// i % 8 of matrix i / 8.
DEVICE void load4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
DEVICE void load4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
DEVICE void store4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// D [16, 8] += A [16, 16] B [16, 8], fp32 sums; A [16, 8] B [8, 8] for tf32.
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float shuffle(float x, int apart) { return __shfl_xor_sync(0xFFFFFFFFu, x, apart); }
DEVICE double shuffle(double x, int apart) { return __shfl_xor_sync(0xFFFFFFFFu, x, apart); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

DEVICE float widen(float x) { return x; }
DEVICE void round_to(float& to, float x) { to = x; }
DEVICE float widen(bf16 x) { return __bfloat162float(x); }
DEVICE float widen(fp16 x) { return __half2float(x); }
DEVICE void round_to(bf16& to, float x) { to = __float2bfloat16_rn(x); }
DEVICE void round_to(fp16& to, float x) { to = __float2half_rn(x); }

// Two neighbours of 16 bits, the first in the low half.
DEVICE uint32_t pack(float x, float y, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}
DEVICE uint32_t pack(float x, float y, fp16) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}
DEVICE float2 unpack(uint32_t pair, bf16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}
DEVICE float2 unpack(uint32_t pair, fp16) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

}  // namespace grasp
#endif

namespace grasp {

// Two sums over a block of THREADS, in a fixed order, in thread 0; `scratch` has a pair for a warp.
template <int THREADS>
DEVICE void block_sums(float (&x)[2], float* scratch) {
  UNROLL
  for (int i = 0; i < 2; ++i) {
    UNROLL
    for (int apart = 16; apart >= 1; apart /= 2) x[i] += shuffle(x[i], apart);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * 2 + i] = x[i];
  }
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < THREADS / 32; ++warp) {
    x[0] += scratch[warp * 2];
    x[1] += scratch[warp * 2 + 1];
  }
}

// To what a matrix had and lost so far; one thread owns it. An overflow is left out.
DEVICE void add_energy(float* energy, const float (&x)[2]) {
  if (!(x[0] <= 3.4e38f)) return;
  energy[0] += x[0];
  energy[1] += x[1];
}

}  // namespace grasp
