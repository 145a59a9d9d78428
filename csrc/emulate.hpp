// A grid on a CPU: every thread of a cluster is a fiber, run in turn until it waits for others.
// Warp-wide instructions follow the fragment layouts of the PTX manual (mma, ldmatrix, stmatrix).
//
// It is meant to show mistakes: shared memory starts as NaN; a copy, a store or a message to another
// block comes late and in any order, under half of the seeds only when nothing else can run; the
// order of warps and lanes is drawn from the seed too; addresses and sizes are checked; a wait that
// never ends is an error.
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

// ---- fibers ------------------------------------------------------------------------------------

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

// ---- flags and copies --------------------------------------------------------------------------

struct Flag {
  uint8_t phase, count, pending, mark;
  int32_t bytes;

  static Flag& at(uint64_t* p) {
    Flag& flag = *reinterpret_cast<Flag*>(p);
    if (flag.mark != 0x5A) throw std::runtime_error("a flag was not made");
    return flag;
  }
  void settle() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = count;
    cluster_now.woke = true;
  }
  void arrive() {
    if (pending == 0) throw std::runtime_error("one too many arrived at a flag");
    --pending;
    settle();
  }
  void come(int n) {
    bytes -= n;
    settle();
  }
};
inline void flag_init(uint64_t* p, int count) {
  const uint8_t n = uint8_t(count);
  *reinterpret_cast<Flag*>(p) = {0, n, n, 0x5A, 0};
}
inline void flags_ready() {}
inline void flag_arrive(uint64_t* p) { Flag::at(p).arrive(); }
inline void flag_expect(uint64_t* p, int bytes) {
  Flag::at(p).bytes += bytes;
  Flag::at(p).arrive();
}
inline void flag_wait(uint64_t* p, int parity) {
  wait_while(&Flag::at(p).phase, 1, uint8_t(parity));
}

inline bool flag_ended(uint64_t* p, int parity) { return (Flag::at(p).phase & 1) != parity; }

inline int64_t bytes_read = 0, bytes_written = 0;  // of matrices, from and to global memory

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) throw std::runtime_error("not aligned to 16 bytes");
}
inline void check_copy(const void* a, const void* b, int bytes) {
  check_aligned(a), check_aligned(b);
  if (bytes <= 0 || bytes % 16) throw std::runtime_error("bytes are no multiple of 16");
}
inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* flag) {
  check_copy(shared, global, bytes);
  cluster_now.pending.push_back([=] {
    memcpy(shared, global, bytes);
    bytes_read += bytes;
    Flag::at(flag).come(bytes);
    return false;
  });
}
inline void finished(Fiber::Stores& stores) {
  if (--stores.left == 0) stores.busy = 0, cluster_now.woke = true;
}
inline void bulk_store(void* global, const void* shared, int bytes) {
  check_copy(global, shared, bytes);
  Fiber* fiber = &fiber_now();
  for (const auto& other : cluster_now.fibers) {
    for (const char* row : other->unfenced) {
      if (row >= shared && row < static_cast<const char*>(shared) + bytes) {
        throw std::runtime_error("stored in bulk before the fence");
      }
    }
  }
  ++fiber->uncommitted;
  auto kept = std::make_shared<std::vector<char>>();
  cluster_now.pending.push_back([=] {  // read at first, written later
    if (kept->empty()) {
      kept->assign(static_cast<const char*>(shared), static_cast<const char*>(shared) + bytes);
      finished(fiber->unread);
      return true;
    }
    memcpy(global, kept->data(), bytes);
    bytes_written += bytes;
    finished(fiber->unwritten);
    return false;
  });
}
inline void bulk_commit() {
  Fiber& fiber = fiber_now();
  for (auto* stores : {&fiber.unread, &fiber.unwritten}) {
    stores->left += fiber.uncommitted;
    stores->busy = stores->left > 0;
  }
  fiber.uncommitted = 0;
}
inline void bulk_read() { wait_while(&fiber_now().unread.busy, 1, 1); }
inline void bulk_done() { wait_while(&fiber_now().unwritten.busy, 1, 1); }
inline void fence_for_bulk() { fiber_now().unfenced.clear(); }

inline void copy16(void* shared, const void* global, bool inside) {
  check_copy(shared, global, 16);
  const auto copies = fiber_now().copies;
  ++copies->left;
  cluster_now.pending.push_back([=] {
    inside ? memcpy(shared, global, 16) : std::memset(shared, 0, 16);
    bytes_read += inside ? 16 : 0;
    if (--copies->left == 0 && copies->flag) Flag::at(copies->flag).arrive();
    return false;
  });
}
inline void copies_arrive(uint64_t* flag) {
  const auto copies = fiber_now().copies;
  copies->flag = flag;
  if (copies->left == 0) Flag::at(flag).arrive();
  fiber_now().copies = std::make_shared<Copies>();
}
inline void write16(void* global, uint4 x) {
  check_aligned(global);
  memcpy(global, &x, 16);
  bytes_written += 16;
}

using Remote = char*;
inline Remote of_rank(const void* shared, int rank) {
  return cluster_now.blocks.at(rank).shared + (static_cast<const char*>(shared) - shared_now());
}
template <typename X>
void send(Remote to, X x, Remote flag) {
  cluster_now.pending.push_back([=] {
    memcpy(to, &x, sizeof x);
    Flag::at(reinterpret_cast<uint64_t*>(flag)).come(sizeof x);
    return false;
  });
}
inline void send16(Remote to, uint4 x, Remote flag) {
  check_aligned(to);
  send(to, x, flag);
}
inline void send4(Remote to, float x, Remote flag) { send(to, x, flag); }
inline float fetch(Remote from) { return *reinterpret_cast<float*>(from); }

// ---- warp-wide instructions --------------------------------------------------------------------

inline uint16_t half_at(const void* row, int i) { return static_cast<const uint16_t*>(row)[i]; }
inline void load4(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  auto& shown = shown_now();
  const int lane = lane_now();
  shown.rows[lane] = row;
  wait_for_warp();
  for (int m = 0; m < 4; ++m) {
    memcpy(&r[m], static_cast<const char*>(shown.rows[m * 8 + lane / 4]) + lane % 4 * 4, 4);
  }
  wait_for_warp();
}
inline void load4_transposed(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  auto& shown = shown_now();
  const int lane = lane_now();
  shown.rows[lane] = row;
  wait_for_warp();
  for (int m = 0; m < 4; ++m) {
    const int down = m * 8 + lane % 4 * 2, across = lane / 4;
    r[m] = half_at(shown.rows[down], across) | uint32_t(half_at(shown.rows[down + 1], across)) << 16;
  }
  wait_for_warp();
}
inline void store4(void* row, const uint32_t (&r)[4]) {
  check_aligned(row);
  auto& shown = shown_now();
  const int lane = lane_now();
  shown.rows[lane] = row;
  wait_for_warp();
  for (int m = 0; m < 4; ++m) {
    char* to = static_cast<char*>(const_cast<void*>(shown.rows[m * 8 + lane / 4]));
    memcpy(to + lane % 4 * 4, &r[m], 4);
  }
  fiber_now().unfenced.push_back(static_cast<const char*>(row));
}

template <typename T>
T shuffle(T x, int apart) {
  auto& shown = shown_now();
  const int lane = lane_now();
  shown.values[lane] = x;
  wait_for_warp();
  return T(shown.values[lane ^ apart]);
}

inline void put(float* to, uint32_t tf32, float) { *to = float_of(tf32 & ~0x1FFFu); }
template <typename T>
void put(float* to, uint32_t pair, T) {
  const float2 both = unpack(pair, T());
  to[0] = both.x, to[1] = both.y;
}
// Each register holds PER numbers, neighbours along k; a fragment covers 4 * PER of k, then as many.
template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  constexpr int PER = 4 / sizeof(T), HALF = 4 * PER;
  auto& shown = shown_now();
  const int lane = lane_now();
  for (int i = 0; i < 4; ++i) put(shown.a[lane] + i * PER, a[i], T());
  put(shown.b[lane], b0, T());
  put(shown.b[lane] + PER, b1, T());
  wait_for_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, low = i / 2;  // rows row + 8 low
    float sum = 0.0f;
    for (int k = 0; k < 2 * HALF; ++k) {
      const int holder = k % HALF / PER, in_half = k / HALF;
      sum += shown.a[row * 4 + holder][(low + 2 * in_half) * PER + k % PER] *
             shown.b[column * 4 + holder][in_half * PER + k % PER];
    }
    d[i] += sum;
  }
}

}  // namespace grasp
