// One pass over a matrix of 16-bit elements: read once, projected, written once.
//
//   right   X [n, d] <- X - (X V - C) V^T      a strip is BS rows
//   left    X [d, n] <- X - U (U^T X - C)      a strip is BS columns
//
// A cluster of blocks owns a strip, each block a slice of it along d, which stays in its shared
// memory between the two products. A block keeps its slice of the basis there for the whole launch
// and goes from strip to strip. The blocks' shares of the coefficients [BS, k] are added in their
// order, each block adding up a part of them for all: the result does not depend on timing.
#pragma once

#include "common.cuh"

namespace grasp {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PAD = 8;  // elements at a row's end, so that eight rows lie in different banks

struct Job {
  const void* in;
  void* out;
  const float* basis;  // [d, k]
  const float* C;      // or null
  int64_t in_step, out_step;  // elements between rows
  int64_t basis_d, basis_k, C_n, C_k;
  int n, d, k;
  int slice;  // of d, for each block of a cluster: a multiple of 16
  float* energies;  // of each strip ‖T‖² and what of it lay in the basis, added to; or null
};

// Bytes of shared memory, laid out in this order.
template <bool LEFT, int KP, int BS>
struct Layout {
  static BOTH int row(int slice) { return (LEFT ? BS : slice) + PAD; }
  static BOTH int rows(int slice) { return LEFT ? slice : BS; }
  int basis, strip, shares, share, total, energy, bytes;
  BOTH explicit Layout(int slice) {
    basis = 0;                                                    // [slice, KP + PAD] of T
    strip = basis + slice * (KP + PAD) * 2;                       // [rows, row] of T
    shares = strip + rows(slice) * row(slice) * 2;                // [WARPS / (KP / 16), BS, KP] fp32
    share = shares + WARPS / (KP / 16) * BS * KP * 4;             // [BS, KP] fp32, of this block
    total = share + BS * KP * 4;                                  // [BS, KP + PAD] of T
    energy = total + BS * (KP + PAD) * 2;                         // 2 pairs, then one for each warp
    bytes = energy + (2 + WARPS) * 8;
  }
};

template <typename T, bool LEFT, int KP, int BS>
struct Strip {
  static constexpr int COLUMNS = KP / 16;        // warps side by side over the rank, 16 wide
  static constexpr int DEPTH = WARPS / COLUMNS;  // warps in turn along d
  static constexpr int BASIS = KP + PAD;

  const Job& job;
  Layout<LEFT, KP, BS> at;
  char* shared;
  int thread, warp, lane, first, size;  // this block's slice of d: [first, first + size)

  DEVICE Strip(const Job& job, char* shared)
      : job(job), at(job.slice), shared(shared), thread(threadIdx.x), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {
    first = cluster_rank() * job.slice;
    const int left = job.d - first;
    size = left < 0 ? 0 : left < job.slice ? left : job.slice;
  }
  DEVICE T* basis() { return reinterpret_cast<T*>(shared + at.basis); }
  DEVICE T* strip() { return reinterpret_cast<T*>(shared + at.strip); }
  DEVICE float* shares() { return reinterpret_cast<float*>(shared + at.shares); }
  DEVICE float* share() { return reinterpret_cast<float*>(shared + at.share); }
  DEVICE T* total() { return reinterpret_cast<T*>(shared + at.total); }
  // This block's part of a strip's energies. Two in turn: the next strip's is written while the
  // first block may still read this one's.
  DEVICE float* energy(int turn) { return reinterpret_cast<float*>(shared + at.energy) + turn * 2; }

  // The slice of the basis, zero where there is none.
  DEVICE void keep_basis() {
    for (int i = thread; i < job.slice * KP; i += THREADS) {
      const int e = i / KP, j = i % KP;
      const bool inside = e < size && j < job.k;
      const float v = inside ? job.basis[(first + e) * job.basis_d + j * job.basis_k] : 0.0f;
      round_to(basis()[e * BASIS + j], v);
    }
  }

  // Whether the 8 elements from column `column` of row `r` of the strip's slice are in the matrix,
  // and where. Rows are 16-byte aligned and lengths multiples of 8, so all are in or none.
  DEVICE bool inside(int index, int r, int column) const {
    return LEFT ? r < size && index * BS + column < job.n
                : index * BS + r < job.n && column < size;
  }
  DEVICE int64_t offset(int index, int r, int column, int64_t step) const {
    return LEFT ? int64_t(first + r) * step + index * BS + column
                : (int64_t(index) * BS + r) * step + first + column;
  }

  DEVICE void load(int index) {
    const int row = at.row(job.slice), rows = at.rows(job.slice), chunks = (row - PAD) / 8;
    const T* in = static_cast<const T*>(job.in);
    for (int i = thread; i < rows * chunks; i += THREADS) {
      const int r = i / chunks, column = i % chunks * 8;
      const bool is = inside(index, r, column);
      copy16(strip() + r * row + column, is ? in + offset(index, r, column, job.in_step) : in, is);
    }
    copies_commit();
  }

  DEVICE void store(int index) {
    const int row = at.row(job.slice), rows = at.rows(job.slice), chunks = (row - PAD) / 8;
    T* out = static_cast<T*>(job.out);
    for (int i = thread; i < rows * chunks; i += THREADS) {
      const int r = i / chunks, column = i % chunks * 8;
      if (inside(index, r, column)) {
        write16(out + offset(index, r, column, job.out_step), strip() + r * row + column);
      }
    }
  }

  // shares[depth] [BS, KP] = X V over the part of d that this warp's turn falls on.
  DEVICE void first_product() {
    const int column = warp % COLUMNS * 16, turn = warp / COLUMNS;
    const int row = at.row(job.slice);
    float sums[BS / 16][2][4] = {};
    for (int e = turn * 16; e < job.slice; e += DEPTH * 16) {
      uint32_t b[4];  // rows e.. of V, 16 columns: lanes 0-7 and 8-15 give its two halves along d
      load4_transposed(b, basis() + (e + lane % 16) * BASIS + column + lane / 16 * 8);
UNROLL
      for (int m = 0; m < BS / 16; ++m) {
        uint32_t a[4];
        if (LEFT) {  // stored [d, BS]: matrices in the order (s, e), (s + 8, e), (s, e + 8), ...
          const int deep = lane / 16 * 8 + lane % 8, wide = lane / 8 % 2 * 8;
          load4_transposed(a, strip() + (e + deep) * row + m * 16 + wide);
        } else {
          load4(a, strip() + (m * 16 + lane % 16) * row + e + lane / 16 * 8);
        }
        multiply(sums[m][0], a, b[0], b[1], T());
        multiply(sums[m][1], a, b[2], b[3], T());
      }
    }
    float* mine = shares() + turn * BS * KP;
    for (int m = 0; m < BS / 16; ++m) {
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) {
          const int s = m * 16 + lane / 4 + i / 2 * 8;
          mine[s * KP + column + h * 8 + lane % 4 * 2 + i % 2] = sums[m][h][i];
        }
      }
    }
  }

  // total [BS, KP] = the sum of all blocks' shares, less C; this block's part of it to every block.
  DEVICE void add_up(int index, int turn) {
    float had_and_lost[2] = {};
    __syncthreads();
    if (job.energies != nullptr) {
      const int row = at.row(job.slice), wide = row - PAD, elements = at.rows(job.slice) * wide;
      for (int i = thread; i < elements; i += THREADS) {
        const float x = widen(strip()[i / wide * row + i % wide]);
        had_and_lost[0] += x * x;
      }
    }
    for (int i = thread; i < BS * KP; i += THREADS) {
      float sum = 0.0f;
      for (int turn = 0; turn < DEPTH; ++turn) sum += shares()[turn * BS * KP + i];
      share()[i] = sum;
    }
    cluster_sync();
    const int blocks = cluster_size(), part = BS * KP / blocks, from = cluster_rank() * part;
    for (int i = from + thread; i < from + part; i += THREADS) {
      float sum = 0.0f;
      for (int rank = 0; rank < blocks; ++rank) sum += of_rank(share(), rank)[i];
      had_and_lost[1] += sum * sum;
      const int64_t s = int64_t(index) * BS + i / KP;
      const int j = i % KP;
      if (job.C != nullptr && s < job.n && j < job.k) sum -= job.C[s * job.C_n + j * job.C_k];
      T rounded;
      round_to(rounded, sum);
      for (int rank = 0; rank < blocks; ++rank) {
        of_rank(total(), rank)[i / KP * BASIS + j] = rounded;
      }
    }
    if (job.energies != nullptr) {
      block_sums<THREADS>(had_and_lost, energy(2));
      for (int i = 0; thread == 0 && i < 2; ++i) energy(turn)[i] = had_and_lost[i];
    }
    cluster_sync();
    if (job.energies != nullptr && cluster_rank() == 0 && thread == 0) {
      for (int rank = 1; rank < blocks; ++rank) {
        for (int i = 0; i < 2; ++i) had_and_lost[i] += of_rank(energy(turn), rank)[i];
      }
      add_energy(job.energies + 2 * int64_t(index), had_and_lost);
    }
  }

  // X -= c V^T, or U c^T, in shared memory: 16 x 16 tiles of it, one warp each.
  DEVICE void second_product() {
    const int row = at.row(job.slice);
    const int down = at.rows(job.slice) / 16, across = (row - PAD) / 16;
    T* left = LEFT ? basis() : total();
    T* right = LEFT ? total() : basis();
    for (int tile = warp; tile < down * across; tile += WARPS) {
      const int r = tile / across * 16, column = tile % across * 16;
      float sums[2][4] = {};
UNROLL
      for (int j = 0; j < KP; j += 16) {
        uint32_t a[4], b[4];
        load4(a, left + (r + lane % 16) * BASIS + j + lane / 16 * 8);
        load4(b, right + (column + lane / 16 * 8 + lane % 8) * BASIS + j + lane / 8 % 2 * 8);
        multiply(sums[0], a, b[0], b[1], T());
        multiply(sums[1], a, b[2], b[3], T());
      }
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) {
          T& x = strip()[(r + lane / 4 + i / 2 * 8) * row + column + h * 8 + lane % 4 * 2 + i % 2];
          round_to(x, widen(x) - sums[h][i]);
        }
      }
    }
  }
};

template <typename T, bool LEFT, int KP, int BS>
DEVICE void project_strips(const Job& job, char* shared, int cluster, int clusters) {
  Strip<T, LEFT, KP, BS> strip(job, shared);
  strip.keep_basis();
  const int count = (job.n + BS - 1) / BS;
  int turn = 0;
  for (int index = cluster; index < count; index += clusters, turn = 1 - turn) {
    strip.load(index);
    copies_wait<0>();
    __syncthreads();
    strip.first_product();
    strip.add_up(index, turn);
    strip.second_product();
    __syncthreads();
    strip.store(index);
    __syncthreads();  // the strip's place is free again
  }
  if (job.energies != nullptr) cluster_sync();  // the first block may still read the others' parts
}

}  // namespace grasp
