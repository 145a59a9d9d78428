// A grid on a CPU: every thread of a cluster is a fiber, run in turn until it waits for others.
// Warp-wide instructions follow the fragment layouts of the PTX manual (mma.m16n8k16, ldmatrix).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define DEVICE inline
#define BOTH inline
#define UNROLL

namespace grasp {

using std::sqrt;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};
inline float widen(float x) { return x; }
inline void round_to(float& to, float x) { to = x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen(fp16 x) { return float(x.value); }
inline void round_to(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void round_to(fp16& to, float x) { to.value = _Float16(x); }

struct Barrier {
  int waiting = 0, generation = 0;
};
struct Warp {
  const void* rows[32];
  uint32_t a[32][4], b[32][2];
  double values[32];
  Barrier barrier;
};
struct Block {
  std::vector<char> shared;
  std::vector<Warp> warps;
  Barrier barrier;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int block, thread;
  bool done = false;
};
struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  ucontext_t main;
  Fiber* now = nullptr;
  std::function<void(int)> body;
};
inline Cluster* cluster_now = nullptr;

inline Block& block_now() { return cluster_now->blocks[cluster_now->now->block]; }
inline void wait(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    swapcontext(&cluster_now->now->context, &cluster_now->main);
  }
}

struct Index {
  struct Value {
    operator int() const { return cluster_now->now->thread; }
  } x;
};
inline Index threadIdx;

inline void __syncthreads() { wait(block_now().barrier, int(block_now().warps.size()) * 32); }
inline int cluster_size() { return int(cluster_now->blocks.size()); }
inline int cluster_rank() { return cluster_now->now->block; }
inline void cluster_sync() { wait(cluster_now->barrier, int(cluster_now->fibers.size())); }
template <typename T>
T* of_rank(T* shared, int rank) {
  const auto offset = reinterpret_cast<char*>(shared) - block_now().shared.data();
  return reinterpret_cast<T*>(cluster_now->blocks[rank].shared.data() + offset);
}

inline int64_t bytes_read = 0, bytes_written = 0;  // of matrices, to and from global memory

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw std::runtime_error("not aligned to 16 bytes");
}
inline void copy16(void* shared, const void* global, bool inside) {
  check_aligned(shared);
  check_aligned(global);
  inside ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
  bytes_read += inside ? 16 : 0;
}
inline void write16(void* global, const void* shared) {
  check_aligned(shared);
  check_aligned(global);
  std::memcpy(global, shared, 16);
  bytes_written += 16;
}
inline void copies_commit() {}
template <int N>
void copies_wait() {}

inline Warp& warp_now() { return block_now().warps[cluster_now->now->thread / 32]; }
inline uint16_t element(const void* row, int i) {
  return static_cast<const uint16_t*>(row)[i];
}
inline void load4(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  Warp& warp = warp_now();
  const int lane = cluster_now->now->thread % 32;
  warp.rows[lane] = row;
  wait(warp.barrier, 32);
  for (int m = 0; m < 4; ++m) {
    const void* from = warp.rows[m * 8 + lane / 4];
    r[m] = element(from, lane % 4 * 2) | uint32_t(element(from, lane % 4 * 2 + 1)) << 16;
  }
  wait(warp.barrier, 32);
}
inline void load4_transposed(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  Warp& warp = warp_now();
  const int lane = cluster_now->now->thread % 32;
  warp.rows[lane] = row;
  wait(warp.barrier, 32);
  for (int m = 0; m < 4; ++m) {
    const int down = m * 8 + lane % 4 * 2, across = lane / 4;
    r[m] = element(warp.rows[down], across) | uint32_t(element(warp.rows[down + 1], across)) << 16;
  }
  wait(warp.barrier, 32);
}

template <typename T>
T shuffle(T x, int apart) {
  Warp& warp = warp_now();
  const int lane = cluster_now->now->thread % 32;
  warp.values[lane] = x;
  wait(warp.barrier, 32);
  const T other = T(warp.values[lane ^ apart]);
  wait(warp.barrier, 32);
  return other;
}

template <typename T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T x;
  std::memcpy(&x, &bits, 2);
  return widen(x);
}
template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  Warp& warp = warp_now();
  const int lane = cluster_now->now->thread % 32;
  std::memcpy(warp.a[lane], a, 16);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  wait(warp.barrier, 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, low = i / 2;  // rows row + 8 low
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const float x = half_of<T>(warp.a[row * 4 + holder][low + k / 8 * 2], k % 2);
      const float y = half_of<T>(warp.b[column * 4 + holder][k / 8], k % 2);
      sum += x * y;
    }
    d[i] += sum;
  }
  wait(warp.barrier, 32);
}

inline void enter() {
  Cluster& cluster = *cluster_now;
  cluster.body(cluster.now->block);
  cluster.now->done = true;
  swapcontext(&cluster.now->context, &cluster.main);
}

// Runs `body(block)` in every thread of `blocks` blocks; fails where some wait for ever.
inline void run_cluster(int blocks, int threads, int shared, std::function<void(int)> body) {
  Cluster cluster;
  cluster_now = &cluster;
  cluster.body = body;
  cluster.blocks.resize(blocks);
  for (Block& block : cluster.blocks) {
    block.shared.assign(shared + 16, char(0x7F));  // as uninitialised memory may be: not 0
    block.warps.resize(threads / 32);
  }
  cluster.fibers.resize(size_t(blocks) * threads);
  for (int i = 0; i < int(cluster.fibers.size()); ++i) {
    Fiber& fiber = cluster.fibers[i];
    fiber.block = i / threads;
    fiber.thread = i % threads;
    fiber.stack.resize(1 << 15);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  int left = int(cluster.fibers.size());
  for (int idle = 0; left > 0;) {
    for (Fiber& fiber : cluster.fibers) {
      if (fiber.done) continue;
      cluster.now = &fiber;
      swapcontext(&cluster.main, &fiber.context);
      if (fiber.done) --left, idle = 0;
    }
    if (++idle > 1000000) throw std::runtime_error("deadlock");
  }
  cluster_now = nullptr;
}

inline char* shared_now() {
  char* p = block_now().shared.data();
  return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
}

}  // namespace grasp
