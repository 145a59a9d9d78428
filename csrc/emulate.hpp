// A grid on a CPU: every thread of a cluster is a fiber, run in turn until it waits for others.
// Warp-wide instructions follow the fragment layouts of the PTX manual (mma, ldmatrix, stmatrix).
//
// It is meant to show mistakes: shared memory starts as NaN; a copy, a store or a message to
// another block comes late and in any order, under half of the seeds only when nothing else can
// run; the order of warps and lanes is drawn from the seed too; addresses and sizes are checked; a
// wait that never ends is an error.
#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define DEVICE inline
#define BOTH inline
#define UNROLL

namespace grasp {

using std::memcpy;
using std::sqrt;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

template <typename To, typename From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
inline uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }
inline float float_of(uint32_t bits) { return same_bits<float>(bits); }
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) { return float(x.value); }
inline void round_to(float& to, float x) { to = x; }
inline void round_to(fp16& to, float x) { to.value = _Float16(x); }
inline void round_to(bf16& to, float x) {
  const uint32_t bits = bits_of(x);
  to.bits = std::isnan(x) ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <typename T>
uint32_t pack(float x, float y, T) {
  T pair[2];
  round_to(pair[0], x), round_to(pair[1], y);
  uint32_t both;
  memcpy(&both, pair, 4);
  return both;
}
template <typename T>
float2 unpack(uint32_t pair, T) {
  return {widen(same_bits<T>(uint16_t(pair))), widen(same_bits<T>(uint16_t(pair >> 16)))};
}

struct Barrier {
  int waiting = 0;
  uint8_t generation = 0;
};
struct Warp {
  struct {  // what its lanes show each other; two in turn, so that one wait is enough
    const void* rows[32];
    float a[32][8], b[32][4];
    double values[32];
  } shown[2];
  Barrier barrier;
};
struct Block {
  std::vector<char> memory;
  char* shared;
  std::vector<Warp> warps;
  Barrier all, named;
  bool vote = true, voted = true;
};
struct Copies {  // of one thread, up to an arrival
  int left = 0;
  uint64_t* flag = nullptr;
};
struct Fiber {
  jmp_buf here;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[STACK]};
  int block, thread;
  bool started, done;
  unsigned shown;
  // It waits while the bits `mask` of what lies at `watched` are `value`.
  const uint8_t* watched;
  uint8_t mask, value;
  std::shared_ptr<Copies> copies;
  int uncommitted;
  struct Stores {  // committed bulk stores
    int left = 0;
    uint8_t busy = 0;
  } unread, unwritten;
  std::vector<const char*> unfenced;  // rows that the copy engine may not see yet
  static constexpr size_t STACK = 1 << 15;

  bool waits() const { return watched != nullptr && (*watched & mask) == value; }
};
struct Cluster {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::function<bool()>> pending;  // copies on their way; true where it has to go on
  std::mt19937 random;
  Barrier barrier;
  jmp_buf main;
  Fiber* now = nullptr;
  bool woke = false;  // a wait may have ended
  std::string error;
  std::function<void()> body;
};
inline Cluster cluster_now;

inline Fiber& fiber_now() { return *cluster_now.now; }
inline Block& block_now() { return cluster_now.blocks[fiber_now().block]; }
inline Warp& warp_now() { return block_now().warps[fiber_now().thread / 32]; }
inline int lane_now() { return fiber_now().thread % 32; }
inline char* shared_now() { return block_now().shared; }

inline void wait_while(const uint8_t* watched, uint8_t mask, uint8_t value) {
  Fiber& fiber = fiber_now();
  fiber.watched = watched, fiber.mask = mask, fiber.value = value;
  if (fiber.waits() && !_setjmp(fiber.here)) _longjmp(cluster_now.main, 1);
  fiber.watched = nullptr;
}
inline void wait(Barrier& barrier, int count) {
  const uint8_t generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
  } else {
    wait_while(&barrier.generation, 0xFF, generation);
  }
}
inline void wait_for_warp() { wait(warp_now().barrier, 32); }
inline auto& shown_now() { return warp_now().shown[++fiber_now().shown % 2]; }

inline void enter() {
  try {
    cluster_now.body();
  } catch (const std::exception& error) {
    cluster_now.error = error.what();
  }
  fiber_now().done = true;
  _longjmp(cluster_now.main, 1);
}
inline void resume(Fiber& fiber) {
  cluster_now.now = &fiber;
  if (_setjmp(cluster_now.main)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}
inline void deliver() {
  auto& pending = cluster_now.pending;
  for (cluster_now.woke = false; !pending.empty() && !cluster_now.woke;) {
    std::swap(pending[cluster_now.random() % pending.size()], pending.back());
    const auto copy = std::move(pending.back());
    pending.pop_back();
    if (copy()) pending.push_back(copy);
  }
}

// Runs `body` in every thread of a cluster; what went wrong, or nothing.
inline std::string run_cluster(
    int blocks, int threads, int shared, unsigned seed, std::function<void()> body) {
  Cluster& cluster = cluster_now;
  cluster.body = body;
  cluster.random.seed(seed);
  cluster.error.clear();
  cluster.pending.clear();
  cluster.barrier = Barrier();
  cluster.blocks.assign(blocks, Block());
  for (Block& block : cluster.blocks) {
    block.memory.assign(shared + 128, char(0xFF));
    block.shared = block.memory.data() + (-reinterpret_cast<uintptr_t>(block.memory.data()) & 127);
    block.warps.resize(threads / 32);
  }
  while (int(cluster.fibers.size()) < blocks * threads) cluster.fibers.emplace_back(new Fiber());
  for (auto& fiber : cluster.fibers) fiber->unfenced.clear();  // an earlier run's too
  std::vector<std::vector<Fiber*>> warps(blocks * threads / 32);
  for (int i = 0; i < blocks * threads; ++i) {
    Fiber& fiber = *cluster.fibers[i];
    fiber.block = i / threads, fiber.thread = i % threads;
    fiber.started = fiber.done = false;
    fiber.shown = fiber.uncommitted = 0;
    fiber.watched = nullptr;
    fiber.copies = std::make_shared<Copies>();
    fiber.unread = fiber.unwritten = {};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    warps[i / 32].push_back(&fiber);
  }
  std::shuffle(warps.begin(), warps.end(), cluster.random);
  for (auto& warp : warps) {
    if (cluster.random() % 2) std::reverse(warp.begin(), warp.end());
  }
  const bool greedy = cluster.random() % 2;  // a warp goes on until it waits for others
  const bool early = cluster.random() % 2;  // or copies come only when nothing else can run
  for (int left = blocks * threads; left > 0;) {
    bool any = false;
    if (early && cluster.random() % 4 == 0) deliver();
    for (auto& warp : warps) {
      bool again = true;
      while (again) {
        again = false;
        for (Fiber* fiber : warp) {
          if (fiber->done || fiber->waits()) continue;
          resume(*fiber);
          if (!cluster.error.empty()) return cluster.error;
          left -= fiber->done;
          any = again = true;
        }
        again = again && greedy;
      }
    }
    if (any) continue;
    if (cluster.pending.empty()) return "deadlock";
    deliver();
  }
  while (!cluster.pending.empty()) deliver();
  return cluster.error;
}

struct Index {
  struct Value {
    operator int() const { return fiber_now().thread; }
  } x;
};
inline Index threadIdx;

inline void __syncthreads() { wait(block_now().all, int(block_now().warps.size()) * 32); }
template <int THREADS>
void sync_first_threads() {
  wait(block_now().named, THREADS);
}
template <int THREADS>
bool all_of_first_threads(bool yes) {
  Block& block = block_now();
  block.vote = block.vote && yes;
  if (block.named.waiting + 1 == THREADS) block.voted = block.vote, block.vote = true;
  wait(block.named, THREADS);
  return block.voted;
}
inline void sync_warp() { wait_for_warp(); }
inline int cluster_size() { return int(cluster_now.blocks.size()); }
inline int cluster_rank() { return fiber_now().block; }
inline void cluster_sync() {
  wait(cluster_now.barrier, cluster_size() * int(block_now().warps.size()) * 32);
}

}  // namespace grasp

#include "emulate_instructions.hpp"
