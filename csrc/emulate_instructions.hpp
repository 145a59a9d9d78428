// Flags, copies, messages and warp-wide instructions for emulate.hpp, which includes this.
#pragma once

namespace grasp {

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

inline void flag_wait_for_cluster(uint64_t* p, int parity) { flag_wait(p, parity); }
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
    const uint32_t second = half_at(shown.rows[down + 1], across);
    r[m] = half_at(shown.rows[down], across) | second << 16;
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
// As the hardware adds: what fp32 does not hold is dropped.
inline float cut_off(double x) {
  const float nearest = float(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
// Each register holds PER numbers, neighbours along k; a fragment covers HALF of k, then as many.
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
    double sum = d[i];
    for (int k = 0; k < 2 * HALF; ++k) {
      const int holder = k % HALF / PER, in_half = k / HALF;
      sum += shown.a[row * 4 + holder][(low + 2 * in_half) * PER + k % PER] *
             shown.b[column * 4 + holder][in_half * PER + k % PER];
    }
    d[i] = cut_off(sum);
  }
}

}  // namespace grasp
