// Many small matrices of any dtype and either side in one launch, its table passed by value.
//
// A block owns SIDE positions of one matrix: rows on the right side, columns on the left. It walks
// along d to find their coefficients and back to take them off; between the two the strip stays in
// cache. Sums are fp32, in an order that timing does not change.
#pragma once

#include "common.cuh"

namespace grasp {

constexpr int LIST_THREADS = 256;
constexpr int SIDE = 16;

struct Entry {
  void* in;
  void* out;
  const float* basis;  // [d, k], rows one after another
  const float* C;      // [n, k] or, if `C_turned`, [k, n], rows one after another; or null
  int in_step, out_step, n, d;
  int first;  // of all the strips of the launch, this matrix's first one
  short k;
  unsigned char kind;
  bool left : 1, C_turned : 1;
};

constexpr int ENTRIES = 584;  // of 56 bytes: what 32 KiB of kernel arguments hold
struct Table {
  Entry entries[ENTRIES];
  float* energies;  // of each strip ‖T‖² and what of it lay in the basis, added to; or null
  int count;
};

DEVICE const Entry& entry_of(const Table& table, int strip) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first <= strip) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.entries[low];
}

// Lane and warp walk so that neighbouring lanes touch neighbouring elements: along d on the right
// side, where a warp owns ROWS positions; across the strip on the left, where a thread owns one.
template <typename T, int KP, bool LEFT>
struct ListStrip {
  static constexpr int WARPS = LIST_THREADS / 32;
  static constexpr int ROWS = LEFT ? 1 : SIDE / WARPS;
  static constexpr int STEP = LEFT ? LIST_THREADS / SIDE : 32;  // along d

  const Entry& entry;
  float* shared;  // [WARPS, SIDE, KP], its first [SIDE, KP] the coefficients in the end
  int lane, warp, s, e;  // the first position and the first place along d
  int64_t origin;

  DEVICE ListStrip(const Entry& entry, int strip, float* shared)
      : entry(entry), shared(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    s = LEFT ? lane % SIDE : warp * ROWS;
    e = LEFT ? warp * 2 + lane / SIDE : lane;
    origin = int64_t(strip - entry.first) * SIDE;
  }
  DEVICE bool has(int i) const { return origin + s + i < entry.n; }
  DEVICE int64_t offset(int i, int at, int64_t step) const {
    return LEFT ? at * step + origin + s : (origin + s + i) * step + at;
  }

  DEVICE void values(int at, float (&x)[ROWS]) const {
    const T* in = static_cast<const T*>(entry.in);
    UNROLL
    for (int i = 0; i < ROWS; ++i) x[i] = has(i) ? widen(in[offset(i, at, entry.in_step)]) : 0.0f;
  }

  DEVICE void coefficients(float* energy) {
    float sums[ROWS][KP] = {};
    float had_and_lost[2] = {};
    for (int at = e; at < entry.d; at += STEP) {
      float x[ROWS];
      values(at, x);
      UNROLL
      for (int i = 0; i < ROWS; ++i) had_and_lost[0] += x[i] * x[i];
      const float* v = entry.basis + int64_t(at) * entry.k;
      UNROLL
      for (int j = 0; j < KP; ++j) {
        if (j < entry.k) {
          UNROLL
          for (int i = 0; i < ROWS; ++i) sums[i][j] += x[i] * v[j];
        }
      }
    }
    UNROLL
    for (int i = 0; i < ROWS; ++i) {
      UNROLL
      for (int j = 0; j < KP; ++j) {
        float sum = sums[i][j];
        UNROLL
        for (int apart = 16; apart >= (LEFT ? SIDE : 1); apart /= 2) sum += shuffle(sum, apart);
        if (LEFT ? lane < SIDE : lane == 0) {
          shared[((LEFT ? warp : 0) * SIDE + s + i) * KP + j] = sum;
        }
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < SIDE * KP; at += LIST_THREADS) {
      float sum = shared[at];
      for (int other = 1; LEFT && other < WARPS; ++other) sum += shared[other * SIDE * KP + at];
      had_and_lost[1] += sum * sum;
      const int64_t position = origin + at / KP;
      const int j = at % KP;
      if (entry.C != nullptr && position < entry.n && j < entry.k) {
        sum -= entry.C[entry.C_turned ? int64_t(j) * entry.n + position : position * entry.k + j];
      }
      shared[at] = sum;
    }
    __syncthreads();
    if (energy == nullptr) return;
    block_sums<LIST_THREADS>(had_and_lost, shared + SIDE * KP);
    if (threadIdx.x == 0) add_energy(energy, had_and_lost);
  }

  DEVICE void take_off() {
    T* out = static_cast<T*>(entry.out);
    float c[ROWS][KP];
    UNROLL
    for (int i = 0; i < ROWS; ++i) {
      UNROLL
      for (int j = 0; j < KP; ++j) c[i][j] = shared[(s + i) * KP + j];
    }
    const int last = e < entry.d ? e + (entry.d - 1 - e) / STEP * STEP : -1;
    for (int at = last; at >= 0; at -= STEP) {
      float x[ROWS];
      values(at, x);
      const float* v = entry.basis + int64_t(at) * entry.k;
      UNROLL
      for (int j = 0; j < KP; ++j) {
        if (j < entry.k) {
          UNROLL
          for (int i = 0; i < ROWS; ++i) x[i] -= c[i][j] * v[j];
        }
      }
      UNROLL
      for (int i = 0; i < ROWS; ++i) {
        if (has(i)) round_to(out[offset(i, at, entry.out_step)], x[i]);
      }
    }
  }
};

template <typename T, int KP>
DEVICE void list_strip(const Entry& entry, int strip, float* shared, float* energy) {
  if (entry.left) {
    ListStrip<T, KP, true> work(entry, strip, shared);
    work.coefficients(energy);
    work.take_off();
  } else {
    ListStrip<T, KP, false> work(entry, strip, shared);
    work.coefficients(energy);
    work.take_off();
  }
}

template <int KP>
DEVICE void project_list(const Table& table, int strip, float* shared) {
  const Entry& entry = entry_of(table, strip);
  float* energy = table.energies == nullptr ? nullptr : table.energies + 2 * strip;
  if (entry.kind == FLOAT) {
    list_strip<float, KP>(entry, strip, shared, energy);
  } else if (entry.kind == BFLOAT) {
    list_strip<bf16, KP>(entry, strip, shared, energy);
  } else {
    list_strip<fp16, KP>(entry, strip, shared, energy);
  }
}

}  // namespace grasp
