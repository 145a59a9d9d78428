// Many tall matrices in one launch, a block for each.
//
//   for each column:  w <- w / |w|;  twice:  w <- w - Q (Q^T w);  keep w / |w| where |w| > rtol
//
// All in fp64: a column rounded before the next is taken off it would hide that the next depends on
// it. The column at hand stays in shared memory. A kept column goes at once before the ones that are
// dropped; those are 0 in the end.
#pragma once

#include "common.cuh"

namespace grasp {

constexpr int TALL_THREADS = 256;

struct Tall {
  void* W;
  double* Q;  // [d, k], for the columns found so far
  int64_t* rank;
  int64_t step, unit;  // elements between rows, and between columns
  double rtol;
  int d, k;
};

constexpr int TALLS = 584;  // of 56 bytes: what 32 KiB of kernel arguments hold
struct Talls {
  Tall matrices[TALLS];
  int count;
};

// The same sum in every thread, added up in one order.
DEVICE double sum_of_block(double value, double* shared) {
  UNROLL
  for (int apart = 16; apart >= 1; apart /= 2) value += shuffle(value, apart);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < TALL_THREADS / 32; ++warp) sum += shared[warp];
  return sum;
}

// shared: [TALL_THREADS / 32, KP] + [KP] + [d] doubles
template <typename T, int KP>
DEVICE void orthonormalize(const Tall& m, double* shared) {
  constexpr int WARPS = TALL_THREADS / 32;
  T* W = static_cast<T*>(m.W);
  double* sums = shared;
  double* c = sums + WARPS * KP;
  double* w = c + KP;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int rank = 0;
  for (int column = 0; column < m.k; ++column) {
    double mine = 0.0;
    for (int e = thread; e < m.d; e += TALL_THREADS) {
      const double x = widen(W[e * m.step + column * m.unit]);
      w[e] = x;
      mine += x * x;
    }
    double size = sqrt(sum_of_block(mine, sums));
    bool keep = false;
    for (int again = 0; again < 2; ++again) {
      const double scale = size > 0 ? 1 / size : 0;
      double inside[KP] = {};
      for (int e = thread; e < m.d; e += TALL_THREADS) {
        const double x = w[e] * scale;
        w[e] = x;
        UNROLL
        for (int j = 0; j < KP; ++j) {
          if (j < rank) inside[j] += m.Q[int64_t(e) * m.k + j] * x;
        }
      }
      __syncthreads();
      UNROLL
      for (int j = 0; j < KP; ++j) {
        double sum = inside[j];
        UNROLL
        for (int apart = 16; apart >= 1; apart /= 2) sum += shuffle(sum, apart);
        if (lane == 0) sums[warp * KP + j] = sum;
      }
      __syncthreads();
      for (int j = thread; j < KP; j += TALL_THREADS) {
        double sum = 0.0;
        for (int other = 0; other < WARPS; ++other) sum += sums[other * KP + j];
        c[j] = sum;
      }
      __syncthreads();
      mine = 0.0;
      for (int e = thread; e < m.d; e += TALL_THREADS) {
        double x = w[e];
        for (int j = 0; j < rank; ++j) x -= m.Q[int64_t(e) * m.k + j] * c[j];
        w[e] = x;
        mine += x * x;
      }
      size = sqrt(sum_of_block(mine, sums));
      if (again == 0) keep = size > m.rtol;
    }
    if (keep) {  // the same in every thread
      for (int e = thread; e < m.d; e += TALL_THREADS) {
        m.Q[int64_t(e) * m.k + rank] = w[e] / size;
      }
      ++rank;
    }
    __syncthreads();
  }
  for (int64_t i = thread; i < int64_t(m.d) * m.k; i += TALL_THREADS) {
    const int j = i % m.k;
    round_to(W[i / m.k * m.step + j * m.unit], j < rank ? float(m.Q[i]) : 0.0f);
  }
  if (thread == 0) *m.rank = rank;
}

}  // namespace grasp
