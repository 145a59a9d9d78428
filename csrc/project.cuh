// One pass over a large matrix: read once, projected, written once.
//
//   right   X [n, d] <- X - (X V - C) V^T      a strip is BS rows
//   left    X [d, n] <- X - U (U^T X - C)      a strip is BS columns
//
// A cluster of blocks owns a strip, each block a slice of it along d; the block's slice of the
// basis stays in its shared memory for the whole launch. In a block three kinds of warps go from
// strip to strip, each at its own pace, and wait for each other through flags alone:
//
//   move       T ──▶ stage i+2 ──▶ full          done ──▶ stage i-1 ──▶ T
//   multiply                       full ──▶ X V of strip i+1 ──▶ shares to their owners' inbox
//              total ──▶ X -= c V^T of strip i ──▶ done
//   add        inbox ──▶ the blocks' shares of some positions, added up in their order; less C
//              ──▶ total of every block
//
// So a strip's sums travel while the strips beside it are multiplied and moved. Inbox and total
// have two places each. That is enough without a flag for "free": a block sends what goes into a
// place only after it got the total of two strips before, for which every owner had emptied its
// inbox; an owner sends a total only after all blocks sent shares, which they do after they read
// the total of two strips before. No sum depends on timing.
#pragma once

#include "project_products.cuh"

namespace grasp {

// Goes round `count` places; the parity of a flag's phase changes with each round.
struct Ring {
  int at = 0, parity = 0;
  DEVICE void next(int count) {
    if (++at == count) at = 0, parity ^= 1;
  }
};

template <typename T, bool LEFT, int KP, int SLICE, int BS>
struct Strips : Products<T, LEFT, KP, SLICE, BS> {
  using Base = Products<T, LEFT, KP, SLICE, BS>;
  using typename Base::At;
  using Base::BASIS_ROW, Base::CHUNK, Base::ROW, Base::SCALED, Base::SIZE;
  using Base::energy, Base::first, Base::job, Base::lane, Base::rank, Base::shared, Base::thread,
      Base::warp, Base::width;
  static constexpr int MOVERS = LEFT ? 64 : 32, THREADS = MULTIPLIERS + 32 + MOVERS;
  static constexpr int TOTAL_BYTES = BS * KP * SIZE + (SCALED ? BS * 4 : 0);
  static constexpr int QUADS = (BS * KP / 4 + MULTIPLIERS - 1) / MULTIPLIERS;

  int cluster, clusters, count;  // strips cluster, cluster + clusters, ... of `count`
  int blocks;

  DEVICE Strips(const Job& job, char* shared, int cluster, int clusters)
      : Base(job, shared), cluster(cluster), clusters(clusters), count((job.n + BS - 1) / BS),
        blocks(cluster_size()) {}

  DEVICE char* stage(int i) { return shared + At::STAGES + i * At::STAGE; }
  DEVICE char* total(int turn) { return shared + At::TOTAL + turn * BS * KP * SIZE; }
  DEVICE char* inbox(int turn) { return shared + At::INBOX + turn * BS * KP * 4; }
  DEVICE float* scales(int turn) {
    return reinterpret_cast<float*>(shared + At::SCALES) + turn * BS;
  }
  DEVICE uint64_t* flag(int i) { return reinterpret_cast<uint64_t*>(shared + At::FLAGS) + i; }
  DEVICE uint64_t* full(int i) { return flag(i); }                // stage i has been read
  DEVICE uint64_t* done(int i) { return flag(MOST_STAGES + i); }  // and may be written out
  DEVICE uint64_t* came(int turn) { return flag(2 * MOST_STAGES + turn); }        // all shares
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
    // Nothing is read or written beyond the end of d: zeros stay there.
    constexpr int ROWS = LEFT ? SLICE : BS;
    for (int i = thread; i < job.stages * ROWS; i += THREADS) {
      char* row = stage(i / ROWS) + i % ROWS * ROW;
      const int from = !LEFT ? width * SIZE : i % ROWS < width ? ROW : 0;
      for (int at = from; at < ROW; at += 16) *reinterpret_cast<uint4*>(row + at) = uint4{};
    }
  }

  DEVICE void finish() {
    if (job.energies != nullptr) {
      float* sums = reinterpret_cast<float*>(shared + At::ENERGY);
      block_sums<THREADS>(energy, sums);
      __syncthreads();
      if (thread == 0) sums[0] = energy[0], sums[1] = energy[1];
      cluster_sync();
      if (rank == 0 && thread == 0) {
        for (int other = 1; other < blocks; ++other) {
          energy[0] += fetch(of_rank(sums, other));
          energy[1] += fetch(of_rank(sums + 1, other));
        }
        add_energy(job.energies + 2 * cluster, energy);
      }
    }
    cluster_sync();  // nobody writes to a block that has gone
  }

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

  DEVICE void multiply_all() {
    Base::keep_basis();
    sync_first_threads<MULTIPLIERS>();
    Ring reading, writing, sending, getting;  // the first two of stages, the others of two turns
    int next = cluster;                       // strip for the first product
    for (int index = cluster; index < count;) {
      const bool one_is_sent = next == index + clusters;
      if (next < count && (next == index || (one_is_sent && has_come(reading)))) {
        flag_wait(full(reading.at), reading.parity);
        Base::first_product(stage(reading.at));
        send_shares(sending.at);
        reading.next(job.stages), sending.next(2), next += clusters;
      } else {
        flag_wait_for_cluster(summed(getting.at), getting.parity);
        if (thread == 0) flag_expect(summed(getting.at), TOTAL_BYTES);
        Base::second_product(stage(writing.at), total(getting.at), scales(getting.at));
        if (!LEFT) fence_for_bulk();
        sync_warp();
        if (lane == 0) flag_arrive(done(writing.at));
        writing.next(job.stages), getting.next(2), index += clusters;
      }
    }
  }

  // Whether to go ahead with the next strip, which all warps must agree on.
  DEVICE bool has_come(const Ring& place) {
    return all_of_first_threads<MULTIPLIERS>(flag_ended(full(place.at), place.parity));
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
      for (int depth = 0; depth < At::DEPTH; ++depth) {
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
    flag_wait_for_cluster(came(turn.at), turn.parity);
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

}  // namespace grasp
