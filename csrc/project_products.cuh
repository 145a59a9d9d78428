// The two products of a strip, by the warps that multiply: X V, then X -= c V^T, or U c^T.
#pragma once

#include "project_plan.cuh"

namespace grasp {

// The bytes at 16-byte chunk `chunk` of row `row`, swapped about so that the same chunk of eight
// rows, or two neighbouring ones of four, lie in different banks.
template <int PITCH>
BOTH int swizzled(int row, int chunk) {
  constexpr int MASK = (PITCH / 16 < 8 ? PITCH / 16 : 8) - 1;
  const int turned = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
  return row * PITCH + (chunk ^ (turned & MASK)) * 16;
}

// A fragment of a matrix instruction. fp32 is cut in two tf32 parts, of which the first is rounded
// to nearest. The hardware drops the last 13 bits: of the second part that is an error of either
// sign, as its own is. Three products of parts make one.
template <typename T>
struct Fragment {
  uint32_t x[4];
  DEVICE void cut() {}
};
template <>
struct Fragment<float> {
  uint32_t x[4], low[4];
  DEVICE void cut() {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = (x[i] + 0x1000) & ~0x1FFFu;
      low[i] = bits_of(float_of(x[i]) - float_of(high));
      x[i] = high;
    }
  }
};
template <typename T>
DEVICE void multiply(float (&d)[4], const Fragment<T>& a, const Fragment<T>& b, int half, int) {
  multiply(d, a.x, b.x[2 * half], b.x[2 * half + 1], T());
}
DEVICE void multiply(float (&d)[4], const Fragment<float>& a, const Fragment<float>& b, int half,
                     int product) {
  const uint32_t(&left)[4] = product == 0 ? a.low : a.x;
  const uint32_t(&right)[4] = product == 1 ? b.low : b.x;
  multiply(d, left, right[2 * half], right[2 * half + 1], float());
}

template <typename T, bool LEFT, int KP, int SLICE, int BS>
struct Products {
  using At = Layout<sizeof(T), KP, SLICE, BS>;
  static constexpr int SIZE = sizeof(T), CHUNK = 16 / SIZE;  // elements in 16 bytes
  static constexpr int STEP = 32 / SIZE;                     // of d or k in a matrix instruction
  static constexpr int COLUMNS = At::COLUMNS, DEPTH = At::DEPTH, NP = KP / COLUMNS;
  static constexpr int TILES = NP / 8;                       // matrix instructions side by side
  // What a matrix instruction adds up it cuts off. In fp32 small products are therefore summed apart
  // from large ones, and few of those before they are added to the others.
  static constexpr int PRODUCTS = SIZE == 4 ? 3 : 1, SUMS = SIZE == 4 ? 2 : 1;
  // Of d, subtracted from at once; in fp32 k 64 leaves registers for no more.
  static constexpr int WIDE = SLICE / WARPS < 32 || SIZE * KP > 128 ? 16 : 32;
  static constexpr int BASIS_ROW = KP * SIZE, ROW = LEFT ? BS * SIZE : At::ROW;
  static constexpr bool SCALED = std::is_same<T, fp16>::value;  // c may be beyond fp16

  const Job& job;
  char* shared;
  int rank, thread, warp, lane;
  int first, width;      // this block's slice of d: [first, first + width)
  float energy[2] = {};  // ‖T‖² and what of it lay in the basis, of what this thread has seen

  DEVICE Products(const Job& job, char* shared)
      : job(job), shared(shared), rank(cluster_rank()), thread(threadIdx.x),
        warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    first = rank * job.width;
    const int left = job.d - first;
    width = left < 0 ? 0 : left < job.width ? left : job.width;
  }

  // The slice of the basis, rounded to T, zero where there is none.
  DEVICE void keep_basis() {
    for (int i = thread; i < SLICE * (KP / CHUNK); i += MULTIPLIERS) {
      const int e = i / (KP / CHUNK), chunk = i % (KP / CHUNK);
      T row[CHUNK];
      UNROLL
      for (int c = 0; c < CHUNK; ++c) {
        const int j = chunk * CHUNK + c;
        const bool inside = e < width && j < job.k;
        round_to(row[c], inside ? job.basis[(first + e) * job.basis_d + j * job.basis_k] : 0.0f);
      }
      uint4 packed;
      memcpy(&packed, row, 16);
      *reinterpret_cast<uint4*>(shared + At::BASIS + swizzled<BASIS_ROW>(e, chunk)) = packed;
    }
  }

  static BOTH constexpr int sum_of(int product) { return product < PRODUCTS - 1 ? 1 : 0; }

  template <typename Sums>
  DEVICE static void add_to(Sums& sums, const Sums& others) {
    UNROLL
    for (int i = 0; i < int(sizeof(Sums) / 4); ++i) {
      reinterpret_cast<float*>(sums)[i] += reinterpret_cast<const float*>(others)[i];
    }
  }

  template <int N>
  DEVICE static void copy_shared(uint32_t (&to)[N], const char* from) {
    if constexpr (N == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      to[0] = x.x, to[1] = x.y;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
  }

  // Element [row, column] of a swizzled matrix of fp32.
  template <int PITCH>
  DEVICE static uint32_t element(const char* matrix, int row, int column) {
    const char* at = matrix + swizzled<PITCH>(row, column / 4) + column % 4 * 4;
    return *reinterpret_cast<const uint32_t*>(at);
  }

  // STEP rows of the basis from `e`, NP columns: the right factor of X V. In fp32 a thread reads
  // neighbouring columns, each for another matrix instruction: column n of the t-th is
  // n * TILES + t.
  DEVICE void load_basis_down(Fragment<T> (&b)[NP / 16], int e, int column) {
    const char* basis = shared + At::BASIS + e * BASIS_ROW;
    if constexpr (SIZE == 2) {
      UNROLL
      for (int j = 0; j < NP / 16; ++j) {
        const int chunk = column / CHUNK + j * 2 + lane / 16;
        load4_transposed(b[j].x, basis + swizzled<BASIS_ROW>(lane % 16, chunk));
      }
    } else {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = column + lane / 4 * TILES;
        uint32_t x[TILES];
        copy_shared(x, basis + swizzled<BASIS_ROW>(half * 4 + lane % 4, at / 4) + at % 4 * 4);
        UNROLL
        for (int t = 0; t < TILES; ++t) b[t / 2].x[t % 2 * 2 + half] = x[t];
      }
    }
    UNROLL
    for (int j = 0; j < NP / 16; ++j) b[j].cut();
  }

  // 16 positions of the strip from `s`, STEP of d from `e`: the left factor of X V.
  DEVICE void load_strip(Fragment<T>& a, const char* strip, int s, int e) {
    if constexpr (!LEFT) {
      load4(a.x, strip + (s + lane % 16) * ROW + e * SIZE + lane / 16 * 16);
    } else if constexpr (SIZE == 2) {  // in the order (s, e), (s + 8, e), (s, e + 8), ...
      const int deep = lane / 16 * 8 + lane % 8, chunk = s / 8 + lane / 8 % 2;
      load4_transposed(a.x, strip + e * ROW + swizzled<ROW>(deep, chunk));
    } else {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        a.x[i] = element<ROW>(strip + e * ROW, i / 2 * 4 + lane % 4, s + i % 2 * 8 + lane / 4);
      }
    }
    a.cut();
  }

  // sums += X V over `LENGTH` of d from `from`, at this warp's part of the rank.
  template <int LENGTH>
  DEVICE void multiply_down(float (&sums)[SUMS][BS / 16][TILES][4], const char* strip, int from) {
    UNROLL
    for (int e = 0; e < LENGTH; e += STEP) {
      Fragment<T> b[NP / 16];
      load_basis_down(b, from + e, warp % COLUMNS * NP);
      UNROLL
      for (int m = 0; m < BS / 16; ++m) {
        Fragment<T> a;
        load_strip(a, strip, m * 16, from + e);
        UNROLL
        for (int i = 0; i < PRODUCTS * TILES; ++i) {  // the same sum as far apart as can be
          const int product = i / TILES, j = i % TILES;
          multiply(sums[sum_of(product)][m][j], a, b[j / 2], j % 2, product);
        }
      }
    }
  }

  // parts[depth] [BS, KP] = X V over this warp's part of d and of the rank.
  DEVICE void first_product(const char* strip) {
    const int column = warp % COLUMNS * NP, depth = warp / COLUMNS;
    constexpr int DEEP = SLICE / DEPTH, FEW = DEEP < 4 * STEP ? DEEP : 4 * STEP;
    float sums[SUMS][BS / 16][TILES][4] = {};
    if constexpr (SUMS == 1) {
      multiply_down<DEEP>(sums, strip, depth * DEEP);
    } else {
      UNROLL
      for (int e = 0; e < DEEP; e += FEW) {
        float few[SUMS][BS / 16][TILES][4] = {};
        multiply_down<FEW>(few, strip, depth * DEEP + e);
        add_to(sums[0], few[1]);
        add_to(sums[0], few[0]);
      }
    }
    // The last strip's parts have been read by now: all warps have agreed to go ahead since, or a
    // total has come for which all shares had been sent.
    float* mine = reinterpret_cast<float*>(shared + At::PARTS) + depth * BS * (KP + GAP);
    UNROLL
    for (int m = 0; m < BS / 16; ++m) {
      UNROLL
      for (int low = 0; low < 2; ++low) {
        float* row = mine + (m * 16 + low * 8 + lane / 4) * (KP + GAP) + column;
        UNROLL
        for (int j = 0; j < TILES; ++j) {
          const int n = lane % 4 * 2;
          if constexpr (SIZE == 2) {
            *reinterpret_cast<float2*>(row + j * 8 + n) = {sums[0][m][j][low * 2],
                                                           sums[0][m][j][low * 2 + 1]};
          } else {
            row[n * TILES + j] = sums[0][m][j][low * 2];
            row[n * TILES + TILES + j] = sums[0][m][j][low * 2 + 1];
          }
        }
      }
    }
    sync_first_threads<MULTIPLIERS>();
  }

  // X -= c V^T, or U c^T: 16 of d at a time, for all positions.
  DEVICE void second_product(char* strip, const char* total, const float* scales) {
    Fragment<T> c[BS / 16][KP / STEP];
    float scale[BS / 16][4];
    const int deep = lane / 16 * 8 + lane % 8;  // rows of a right factor, lane % 16 those of a left
    UNROLL
    for (int m = 0; m < BS / 16; ++m) {
      UNROLL
      for (int j = 0; j < KP / STEP; ++j) {
        const int s = m * 16 + (LEFT ? deep : lane % 16);
        const int chunk = 2 * j + (LEFT ? lane / 8 % 2 : lane / 16);
        load4(c[m][j].x, total + swizzled<BASIS_ROW>(s, chunk));
        c[m][j].cut();
      }
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int s = LEFT ? i / 2 * 8 + lane % 4 * 2 + i % 2 : i / 2 * 8 + lane / 4;
        scale[m][i] = SCALED ? scales[m * 16 + s] : 1.0f;
      }
    }
    UNROLL
    for (int tile = 0; tile < SLICE / WARPS; tile += WIDE) {
      const int e = warp * (SLICE / WARPS) + tile;
      if (e >= width) break;
      float sums[SUMS][WIDE / 16][BS / 16][2][4] = {};
      UNROLL
      for (int j = 0; j < KP / STEP; ++j) {
        Fragment<T> v[WIDE / 16];
        const int chunk = 2 * j + (LEFT ? lane / 16 : lane / 8 % 2);
        UNROLL
        for (int w = 0; w < WIDE / 16; ++w) {
          load4(v[w].x, shared + At::BASIS + (e + w * 16) * BASIS_ROW +
                            swizzled<BASIS_ROW>(LEFT ? lane % 16 : deep, chunk));
          v[w].cut();
        }
        UNROLL
        for (int product = 0; product < PRODUCTS; ++product) {
          UNROLL
          for (int i = 0; i < WIDE / 16 * BS / 16 * 2; ++i) {
            const int w = i / (BS / 8), m = i / 2 % (BS / 16), h = i % 2;
            float(&sum)[4] = sums[sum_of(product)][w][m][h];
            LEFT ? multiply(sum, v[w], c[m][j], h, product)
                 : multiply(sum, c[m][j], v[w], h, product);
          }
        }
      }
      if constexpr (SUMS == 2) add_to(sums[0], sums[1]);
      UNROLL
      for (int i = 0; i < WIDE / 16 * BS / 16; ++i) {
        const int w = i / (BS / 16), m = i % (BS / 16);
        subtract(strip, m, e + w * 16, sums[0][w][m], scale[m]);
      }
    }
  }

  // What is subtracted from 16 positions and 16 of d; sums[h] are the columns from h * 8.
  DEVICE void subtract(
      char* strip, int m, int e, const float (&sums)[2][4], const float (&scale)[4]) {
    const auto less = [&](float& x, int h, int i) {
      energy[0] += x * x;
      x -= SCALED ? scale[LEFT ? h * 2 + i % 2 : i] * sums[h][i] : sums[h][i];
    };
    if constexpr (SIZE == 2) {
      uint32_t x[4];
      char* at = LEFT ? strip + e * ROW + swizzled<ROW>(lane % 16, m * 2 + lane / 16)
                      : strip + (m * 16 + lane % 16) * ROW + e * SIZE + lane / 16 * 16;
      load4(x, at);
      UNROLL
      for (int h = 0; h < 2; ++h) {
        UNROLL
        for (int low = 0; low < 2; ++low) {
          float2 pair = unpack(x[h * 2 + low], T());
          less(pair.x, h, low * 2), less(pair.y, h, low * 2 + 1);
          x[h * 2 + low] = pack(pair.x, pair.y, T());
        }
      }
      store4(at, x);
    } else {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        UNROLL
        for (int low = 0; low < 2; ++low) {
          const int row = low * 8 + lane / 4, column = h * 8 + lane % 4 * 2;
          const int chunk = m * 4 + column / 4;
          char* at = LEFT ? strip + e * ROW + swizzled<ROW>(row, chunk) + column % 4 * 4
                          : strip + (m * 16 + row) * ROW + (e + column) * SIZE;
          float2 pair = *reinterpret_cast<float2*>(at);
          less(pair.x, h, low * 2), less(pair.y, h, low * 2 + 1);
          *reinterpret_cast<float2*>(at) = pair;
        }
      }
    }
  }
};

}  // namespace grasp
