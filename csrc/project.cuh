// One pass over a large matrix: read once, projected, written once.
//
//   right   X [n, d] <- X - (X V - C) V^T      a strip is BS rows
//   left    X [d, n] <- X - U (U^T X - C)      a strip is BS columns
//
// A cluster of blocks owns a strip, each block a slice of it along d; the block's slice of the basis
// stays in its shared memory for the whole launch. In a block three kinds of warps go from strip to
// strip, each at its own pace, and wait for each other through flags alone:
//
//   move       T ──▶ stage i+2 ──▶ full          done ──▶ stage i-1 ──▶ T
//   multiply                       full ──▶ X V of strip i+1 ──▶ shares to their owners' inbox
//              total ──▶ X -= c V^T of strip i ──▶ done
//   add        inbox ──▶ the cluster's shares of some positions, in the order of the blocks; less C
//              ──▶ total of every block
//
// So a strip's sums travel while the strips beside it are multiplied and moved. Inbox and total have
// two places each. That is enough without a flag for "free": a block sends what goes into a place
// only after it got the total of two strips before, for which every owner had emptied its inbox; an
// owner sends a total only after all blocks sent shares, which they do after reading the total
// before. No sum depends on timing.
#pragma once

#include "common.cuh"

namespace grasp {

constexpr int WARPS = 8;           // that multiply; then one that adds, then those that move
constexpr int MULTIPLIERS = WARPS * 32;
constexpr int MOST_STAGES = 8;
constexpr int LARGEST_CLUSTER = 8;
constexpr int LARGEST_ROOM = 227 << 10;  // bytes of shared memory that a block has anywhere
constexpr int GAP = 8;             // numbers between rows of partial sums: rows in different banks

struct Job {
  const void* in;
  void* out;
  const float* basis;  // [d, k]
  const float* C;      // or null
  int64_t in_step, out_step;  // elements between rows
  int64_t basis_d, basis_k, C_n, C_k;
  int n, d, k;
  int width;   // of d, for each block of a cluster: a multiple of 32
  int stages;  // strips of which a block holds its slice
  float* energies;  // of each cluster's strips ‖T‖² and what of it lay in the basis, added; or null
};

// Where things lie in shared memory, in bytes; stages come last.
template <int SIZE, int KP, int SLICE, int BS>
struct Layout {
  static constexpr int COLUMNS = KP == 16 ? 1 : 2;  // warps side by side over the rank
  static constexpr int DEPTH = WARPS / COLUMNS;     // warps side by side along d
  static constexpr int BASIS = 0;                                         // [SLICE, KP] of T
  static constexpr int PARTS = BASIS + SLICE * KP * SIZE;                 // [DEPTH, BS, KP + GAP]
  static constexpr int INBOX = PARTS + DEPTH * BS * (KP + GAP) * 4;       // [2, blocks, its part]
  static constexpr int TOTAL = INBOX + 2 * BS * KP * 4;                   // [2, BS, KP] of T
  static constexpr int SCALES = TOTAL + 2 * BS * KP * SIZE;               // [2, BS], for fp16
  static constexpr int FLAGS = SCALES + (SIZE == 2 ? 2 * BS * 4 : 0);
  static constexpr int ENERGY = FLAGS + (2 * MOST_STAGES + 4) * 8;        // a pair for each warp
  static constexpr int STAGES = ENERGY + 128;
  static constexpr int ROW = SLICE * SIZE + 16;  // of a right strip: rows in different banks
  static constexpr int STAGE = BS * ROW;         // a left strip takes no more
  static constexpr bool POSSIBLE = STAGES + 2 * STAGE <= LARGEST_ROOM;
};

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

// Goes round `count` places; the parity of a flag's phase changes with each round.
struct Ring {
  int at = 0, parity = 0;
  DEVICE void next(int count) {
    if (++at == count) at = 0, parity ^= 1;
  }
};

template <typename T, bool LEFT, int KP, int SLICE, int BS>
struct Strips {
  using At = Layout<sizeof(T), KP, SLICE, BS>;
  static constexpr int SIZE = sizeof(T), CHUNK = 16 / SIZE;  // elements in 16 bytes
  static constexpr int STEP = 32 / SIZE;                     // of d or k in a matrix instruction
  static constexpr int COLUMNS = At::COLUMNS, DEPTH = At::DEPTH, NP = KP / COLUMNS;
  static constexpr int TILES = NP / 8;  // matrix instructions side by side
  static constexpr int PRODUCTS = SIZE == 4 ? 3 : 1;
  static constexpr int WIDE = SLICE / WARPS < 32 ? 16 : 32;  // of d that a warp subtracts from at once
  static constexpr int BASIS_ROW = KP * SIZE, ROW = LEFT ? BS * SIZE : At::ROW;
  static constexpr int MOVERS = LEFT ? 128 : 32, THREADS = MULTIPLIERS + 32 + MOVERS;
  static constexpr bool SCALED = std::is_same<T, fp16>::value;  // c may be beyond fp16
  static constexpr int TOTAL_BYTES = BS * KP * SIZE + (SCALED ? BS * 4 : 0);
  static constexpr int QUADS = (BS * KP / 4 + MULTIPLIERS - 1) / MULTIPLIERS;

  const Job& job;
  char* shared;
  int cluster, clusters, count;  // strips cluster, cluster + clusters, ... of `count`
  int rank, blocks, thread, warp, lane;
  int first, width;  // this block's slice of d: [first, first + width)
  float energy[2] = {};

  DEVICE Strips(const Job& job, char* shared, int cluster, int clusters)
      : job(job), shared(shared), cluster(cluster), clusters(clusters),
        count((job.n + BS - 1) / BS), rank(cluster_rank()), blocks(cluster_size()),
        thread(threadIdx.x), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    first = rank * job.width;
    const int left = job.d - first;
    width = left < 0 ? 0 : left < job.width ? left : job.width;
  }

  DEVICE char* stage(int i) { return shared + At::STAGES + i * At::STAGE; }
  DEVICE char* total(int turn) { return shared + At::TOTAL + turn * BS * KP * SIZE; }
  DEVICE char* inbox(int turn) { return shared + At::INBOX + turn * BS * KP * 4; }
  DEVICE float* scales(int turn) { return reinterpret_cast<float*>(shared + At::SCALES) + turn * BS; }
  DEVICE uint64_t* flag(int i) { return reinterpret_cast<uint64_t*>(shared + At::FLAGS) + i; }
  DEVICE uint64_t* full(int i) { return flag(i); }                       // stage i has been read
  DEVICE uint64_t* done(int i) { return flag(MOST_STAGES + i); }         // may be written out
  DEVICE uint64_t* came(int turn) { return flag(2 * MOST_STAGES + turn); }      // all shares
  DEVICE uint64_t* summed(int turn) { return flag(2 * MOST_STAGES + 2 + turn); }  // all of total

  DEVICE void run() {
    prepare();
    cluster_sync();
    if (warp < WARPS) {
      multiply_all();
    } else if (warp == WARPS) {
      add_all();
    } else {
      move_all();
    }
    finish();
  }

  DEVICE void prepare() {
    if (thread == 0) {
      for (int i = 0; i < job.stages; ++i) {
        flag_init(full(i), LEFT ? MOVERS : 1);
        flag_init(done(i), WARPS);
      }
      for (int turn = 0; turn < 2; ++turn) {
        flag_init(came(turn), 1);
        flag_init(summed(turn), 1);
        flag_expect(came(turn), BS * KP * 4);
        flag_expect(summed(turn), TOTAL_BYTES);
      }
      flags_ready();
    }
    // Nothing is ever read or written beyond the end of d: zeros stay there.
    for (int i = thread; i < job.stages * (LEFT ? SLICE : BS); i += THREADS) {
      char* row = stage(i / (LEFT ? SLICE : BS)) + i % (LEFT ? SLICE : BS) * ROW;
      const bool outside = LEFT && i % SLICE >= width;
      for (int at = outside || LEFT ? 0 : width * SIZE; at < (LEFT && !outside ? 0 : ROW); at += 16) {
        *reinterpret_cast<uint4*>(row + at) = uint4{};
      }
    }
  }

  DEVICE void finish() {
    if (job.energies != nullptr) {
      float* sums = reinterpret_cast<float*>(shared + At::ENERGY);
      block_sums<THREADS>(energy, sums);
      __syncthreads();
      for (int i = 0; thread == 0 && i < 2; ++i) sums[i] = energy[i];
      cluster_sync();
      if (rank == 0 && thread == 0) {
        for (int other = 1; other < blocks; ++other) {
          for (int i = 0; i < 2; ++i) energy[i] += fetch(of_rank(sums + i, other));
        }
        add_energy(job.energies + 2 * cluster, energy);
      }
    }
    cluster_sync();  // nobody writes to a block that has gone
  }

  // ---- move: T to shared memory and back -------------------------------------------------------

  DEVICE void move_all() {
    Ring loading, storing;
    int ahead = cluster;
    for (int i = 0; i < job.stages && ahead < count; ++i, ahead += clusters) {
      load(ahead, loading.at);
      loading.next(job.stages);
    }
    for (int index = cluster; index < count; index += clusters, ahead += clusters) {
      flag_wait(done(storing.at), storing.parity);
      store(index, storing.at);
      if (ahead < count) load(ahead, storing.at);
      storing.next(job.stages);
    }
    if (!LEFT) bulk_done();
  }

  DEVICE void load(int index, int place) {
    if (LEFT) {
      const Columns mine(*this, index, job.in_step);
      const T* in = static_cast<const T*>(job.in) + mine.offset;
      for (int r = mine.row; r < width; r += Columns::APART, in += Columns::APART * job.in_step) {
        copy16(stage(place) + mine.at + r * ROW, mine.inside ? in : job.in, mine.inside);
      }
      copies_arrive(full(place));
    } else {
      const int rows = job.n - index * BS < BS ? job.n - index * BS : BS;
      for (int i = rows * (ROW / 16) + lane; i < BS * (ROW / 16); i += 32) {
        *reinterpret_cast<uint4*>(stage(place) + i * 16) = uint4{};  // past the last row
      }
      sync_warp();
      if (lane == 0) flag_expect(full(place), rows * width * SIZE);
      sync_warp();
      if (lane < rows && width) {
        const int64_t from = (int64_t(index) * BS + lane) * job.in_step + first;
        bulk_load(stage(place) + lane * ROW, static_cast<const T*>(job.in) + from, width * SIZE,
                  full(place));
      }
    }
  }

  DEVICE void store(int index, int place) {
    if (LEFT) {
      const Columns mine(*this, index, job.out_step);
      T* out = static_cast<T*>(job.out) + mine.offset;
      constexpr int ONCE = 8;  // loads before the first store
      for (int r = mine.row; r < width; r += ONCE * Columns::APART) {
        uint4 x[ONCE];
        UNROLL
        for (int i = 0; i < ONCE; ++i) {
          const int at = r + i * Columns::APART;
          if (at < width) x[i] = *reinterpret_cast<uint4*>(stage(place) + mine.at + at * ROW);
        }
        UNROLL
        for (int i = 0; i < ONCE; ++i, out += Columns::APART * job.out_step) {
          if (mine.inside && r + i * Columns::APART < width) write16(out, x[i]);
        }
      }
    } else {
      if (lane < BS && index * BS + lane < job.n && width) {
        const int64_t to = (int64_t(index) * BS + lane) * job.out_step + first;
        bulk_store(static_cast<T*>(job.out) + to, stage(place) + lane * ROW, width * SIZE);
      }
      bulk_commit();
      bulk_read();
      sync_warp();
    }
  }

  // The 16-byte columns of a left strip that a thread moves: rows `row`, `row` + APART, ...
  struct Columns {
    static constexpr int WIDE = BS / CHUNK, APART = MOVERS / WIDE;
    int row, at;  // `at` + r * ROW is where row r lies in the stage
    int64_t offset;
    bool inside;
    DEVICE Columns(const Strips& s, int index, int64_t step) {
      const int mover = s.thread - MULTIPLIERS - 32, chunk = mover % WIDE;
      row = mover / WIDE;
      at = swizzled<ROW>(row % 8, chunk) - row % 8 * ROW;
      offset = int64_t(s.first + row) * step + int64_t(index) * BS + chunk * CHUNK;
      inside = index * BS + chunk * CHUNK < s.job.n;
    }
  };

  // ---- multiply: X V, then X - c V^T -----------------------------------------------------------

  DEVICE void multiply_all() {
    keep_basis();
    sync_first_threads<MULTIPLIERS>();
    Ring reading, writing, sending, getting;  // the first two of stages, the others of two turns
    int next = cluster;                       // strip for the first product
    for (int index = cluster; index < count;) {
      const int sent = next - index;
      if (next < count && (sent == 0 || (sent == clusters && has_come(full(reading.at), reading.parity)))) {
        flag_wait(full(reading.at), reading.parity);
        first_product(stage(reading.at));
        send_shares(sending.at);
        reading.next(job.stages), sending.next(2), next += clusters;
      } else {
        flag_wait(summed(getting.at), getting.parity);
        if (thread == 0) flag_expect(summed(getting.at), TOTAL_BYTES);
        second_product(stage(writing.at), getting.at);
        if (!LEFT) fence_for_bulk();
        sync_warp();
        if (lane == 0) flag_arrive(done(writing.at));
        writing.next(job.stages), getting.next(2), index += clusters;
      }
    }
  }

  // Whether to go ahead with the next strip, which all warps must agree on.
  DEVICE bool has_come(uint64_t* flag, int parity) {
    return all_of_first_threads<MULTIPLIERS>(flag_ended(flag, parity));
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

  // parts[depth] [BS, KP] = X V over this warp's part of d and of the rank.
  DEVICE void first_product(const char* strip) {
    const int column = warp % COLUMNS * NP, depth = warp / COLUMNS;
    constexpr int DEEP = SLICE / DEPTH;
    float sums[BS / 16][TILES][4] = {};
    UNROLL
    for (int e = 0; e < DEEP; e += STEP) {
      Fragment<T> b[NP / 16];
      load_basis_down(b, depth * DEEP + e, column);
      UNROLL
      for (int m = 0; m < BS / 16; ++m) {
        Fragment<T> a;
        load_strip(a, strip, m * 16, depth * DEEP + e);
        UNROLL
        for (int i = 0; i < PRODUCTS * TILES; ++i) {  // the same sum as far apart as can be
          const int j = i % TILES;
          multiply(sums[m][j], a, b[j / 2], j % 2, i / TILES);
        }
      }
    }
    sync_first_threads<MULTIPLIERS>();  // the last strip's parts have been read
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
            *reinterpret_cast<float2*>(row + j * 8 + n) = {sums[m][j][low * 2],
                                                           sums[m][j][low * 2 + 1]};
          } else {
            row[n * TILES + j] = sums[m][j][low * 2];
            row[n * TILES + TILES + j] = sums[m][j][low * 2 + 1];
          }
        }
      }
    }
    sync_first_threads<MULTIPLIERS>();
  }

  // The block's share of each position's coefficients, to the block that adds that position up.
  DEVICE void send_shares(int turn) {
    const float* parts = reinterpret_cast<const float*>(shared + At::PARTS);
    const int part = BS / blocks * KP;
    UNROLL
    for (int q = 0; q < QUADS; ++q) {
      const int i = (q * MULTIPLIERS + thread) * 4;
      if (i >= BS * KP) break;
      float4 sum{};
      UNROLL
      for (int depth = 0; depth < DEPTH; ++depth) {
        const int at = (depth * BS + i / KP) * (KP + GAP) + i % KP;
        const float4 x = *reinterpret_cast<const float4*>(parts + at);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      const int owner = i / part;
      const char* place = inbox(turn) + (rank * part + i - owner * part) * 4;
      send16(of_rank(place, owner),
             {bits_of(sum.x), bits_of(sum.y), bits_of(sum.z), bits_of(sum.w)},
             of_rank(came(turn), owner));
    }
  }

  // X -= c V^T, or U c^T: 16 of d at a time, for all positions.
  DEVICE void second_product(char* strip, int turn) {
    Fragment<T> c[BS / 16][KP / STEP];
    float scale[BS / 16][4];
    const int deep = lane / 16 * 8 + lane % 8;  // rows of a right factor, lane % 16 those of a left
    UNROLL
    for (int m = 0; m < BS / 16; ++m) {
      UNROLL
      for (int j = 0; j < KP / STEP; ++j) {
        const int s = m * 16 + (LEFT ? deep : lane % 16);
        const int chunk = 2 * j + (LEFT ? lane / 8 % 2 : lane / 16);
        load4(c[m][j].x, total(turn) + swizzled<BASIS_ROW>(s, chunk));
        c[m][j].cut();
      }
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int s = LEFT ? i / 2 * 8 + lane % 4 * 2 + i % 2 : i / 2 * 8 + lane / 4;
        scale[m][i] = SCALED ? scales(turn)[m * 16 + s] : 1.0f;
      }
    }
    UNROLL
    for (int tile = 0; tile < SLICE / WARPS; tile += WIDE) {
      const int e = warp * (SLICE / WARPS) + tile;
      if (e >= width) break;
      float sums[WIDE / 16][BS / 16][2][4] = {};
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
            LEFT ? multiply(sums[w][m][h], v[w], c[m][j], h, product)
                 : multiply(sums[w][m][h], c[m][j], v[w], h, product);
          }
        }
      }
      UNROLL
      for (int i = 0; i < WIDE / 16 * BS / 16; ++i) {
        const int w = i / (BS / 16), m = i % (BS / 16);
        subtract(strip, m, e + w * 16, sums[w][m], scale[m]);
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
          char* at = LEFT ? strip + e * ROW + swizzled<ROW>(row, m * 4 + column / 4) + column % 4 * 4
                          : strip + (m * 16 + row) * ROW + (e + column) * SIZE;
          float2 pair = *reinterpret_cast<float2*>(at);
          less(pair.x, h, low * 2), less(pair.y, h, low * 2 + 1);
          *reinterpret_cast<float2*>(at) = pair;
        }
      }
    }
  }

  // ---- add: the shares of the positions that this block owns -----------------------------------

  DEVICE void add_all() {
    Ring turn;
    for (int index = cluster; index < count; index += clusters) {
      for (int from = 0; from < BS / blocks * KP; from += 256) add(index, turn, from);
      turn.next(2);
    }
  }

  // Eight coefficients of one position in each lane.
  DEVICE void add(int index, Ring turn, int from) {
    const int part = BS / blocks * KP, i = from + lane * 8, j = i % KP;
    const bool mine = i < part;
    const int s = rank * (BS / blocks) + i / KP;
    const int64_t position = int64_t(index) * BS + s;
    float pinned[8], sum[8] = {};
    UNROLL
    for (int e = 0; e < 8; ++e) {  // asked for before the wait
      const bool is = mine && job.C != nullptr && position < job.n && j + e < job.k;
      pinned[e] = is ? job.C[position * job.C_n + (j + e) * job.C_k] : 0.0f;
    }
    flag_wait(came(turn.at), turn.parity);
    if (from == 0 && lane == 0) flag_expect(came(turn.at), BS * KP * 4);
    for (int other = 0; mine && other < blocks; ++other) {
      const float4* x = reinterpret_cast<float4*>(inbox(turn.at) + (other * part + i) * 4);
      UNROLL
      for (int e = 0; e < 2; ++e) {
        sum[e * 4] += x[e].x, sum[e * 4 + 1] += x[e].y;
        sum[e * 4 + 2] += x[e].z, sum[e * 4 + 3] += x[e].w;
      }
    }
    float largest = 0.0f;
    UNROLL
    for (int e = 0; e < 8; ++e) {
      energy[1] += sum[e] * sum[e];
      sum[e] -= pinned[e];
      largest = fmaxf(largest, fabsf(sum[e]));
    }
    float scale = 1.0f;
    if constexpr (SCALED) {  // by a power of 2 that brings the largest to 2^14
      UNROLL
      for (int apart = 1; apart < KP / 8; apart *= 2) {
        largest = fmaxf(largest, shuffle(largest, apart));
      }
      const uint32_t exponent = bits_of(largest) >> 23 < 32 ? 32 : bits_of(largest) >> 23;
      scale = float_of((exponent - 14) << 23);
      UNROLL
      for (int e = 0; e < 8; ++e) sum[e] *= float_of((268 - exponent) << 23);
    }
    for (int other = 0; mine && other < blocks; ++other) {
      const Remote flag = of_rank(summed(turn.at), other);
      UNROLL
      for (int e = 0; e < 8; e += CHUNK) {
        const char* place = total(turn.at) + swizzled<BASIS_ROW>(s, (j + e) / CHUNK);
        send16(of_rank(place, other), packed(sum + e), flag);
      }
      if (SCALED && j == 0) send4(of_rank(scales(turn.at) + s, other), scale, flag);
    }
  }

  DEVICE static uint4 packed(const float* x) {
    if constexpr (SIZE == 2) {
      return {pack(x[0], x[1], T()), pack(x[2], x[3], T()), pack(x[4], x[5], T()),
              pack(x[6], x[7], T())};
    } else {
      return {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
    }
  }
};

// How a matrix is cut: the one table of what fits, which grasp_kernels/project_cuda.py repeats.
struct Plan {
  int kp, slice, strip;  // the kernel's KP, SLICE, BS; `slice` is 0 where nothing fits
  int blocks, width, stages, bytes;
};

constexpr int kp_of(int k) { return k <= 16 ? 16 : k <= 32 ? 32 : 64; }
constexpr int strip_of(int size, int slice) { return size == 2 && slice == 512 ? 32 : 16; }

template <int SIZE, int KP, int SLICE>
Plan plan_with(int d, int room) {
  using At = Layout<SIZE, KP, SLICE, strip_of(SIZE, SLICE)>;
  const int stages = (room - At::STAGES) / At::STAGE;
  if (!At::POSSIBLE || d > LARGEST_CLUSTER * SLICE || room < At::STAGES || stages < 2) return {};
  int blocks = 1;
  while (blocks * SLICE < d) blocks *= 2;
  const int width = (d + blocks * 32 - 1) / (blocks * 32) * 32;
  const int kept = stages < MOST_STAGES ? stages : MOST_STAGES;
  return {KP, SLICE, strip_of(SIZE, SLICE), blocks, width, kept, At::STAGES + kept * At::STAGE};
}

// The smallest slice that a cluster of eight can cover d with; room is a block's shared memory.
template <int SIZE>
Plan plan_for(int d, int k, int room) {
  const auto with = [&](auto kp) {
    if (d <= 8 * 512) return plan_with<SIZE, kp, 512>(d, room);
    if (d <= 8 * 1024) return plan_with<SIZE, kp, 1024>(d, room);
    return plan_with<SIZE, kp, 2048>(d, room);
  };
  if (k > 64) return {};
  if (k <= 16) return with(std::integral_constant<int, 16>());
  return k <= 32 ? with(std::integral_constant<int, 32>()) : with(std::integral_constant<int, 64>());
}

}  // namespace grasp
