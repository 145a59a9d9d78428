// How a large matrix is cut, and where its parts lie in shared memory.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace grasp {

constexpr int WARPS = 8;           // that multiply; then one that adds, then those that move
constexpr int MULTIPLIERS = WARPS * 32;
constexpr int MOST_STAGES = 8;
constexpr int LARGEST_CLUSTER = 8;
constexpr int LARGEST_ROOM = 227 << 10;  // bytes of shared memory that a block has at most,
constexpr int SMALL_ROOM = 99 << 10;     // and on GPUs for graphics
constexpr int GAP = 8;             // numbers between rows of partial sums: rows in different banks

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
  // Strips of 32 where a slice is short in bytes; such a slice has strips of 16 for small devices.
  static constexpr bool SHORT = SIZE == 2 && SLICE == 512;
  static constexpr int ROOM = SHORT && BS == 16 ? SMALL_ROOM : LARGEST_ROOM;
  static constexpr bool POSSIBLE = (SHORT || BS == 16) && STAGES + 2 * STAGE <= ROOM;
};

// How a matrix is cut: the one table of what fits, which grasp_kernels/project_cuda.py repeats.
struct Plan {
  int kp, slice, strip;  // the kernel's KP, SLICE, BS; `slice` is 0 where nothing fits
  int blocks, width, stages, bytes;
};

constexpr int kp_of(int k) { return k <= 16 ? 16 : k <= 32 ? 32 : 64; }

template <int SIZE, int KP, int SLICE, int BS>
Plan plan_with(int d, int room) {
  using At = Layout<SIZE, KP, SLICE, BS>;
  const int stages = (room - At::STAGES) / At::STAGE;
  if (!At::POSSIBLE || d > LARGEST_CLUSTER * SLICE || room < At::STAGES || stages < 2) return {};
  int blocks = 1;
  while (blocks * SLICE < d) blocks *= 2;
  const int width = (d + blocks * 32 - 1) / (blocks * 32) * 32;
  const int kept = stages < MOST_STAGES ? stages : MOST_STAGES;
  return {KP, SLICE, BS, blocks, width, kept, At::STAGES + kept * At::STAGE};
}

// The smallest slice that a cluster of eight can cover d with; room is a block's shared memory.
template <int SIZE>
Plan plan_for(int d, int k, int room) {
  const auto with = [&](auto kp) {
    if (d > 8 * 1024) return plan_with<SIZE, kp, 2048, 16>(d, room);
    if (d > 8 * 512) return plan_with<SIZE, kp, 1024, 16>(d, room);
    const Plan wide = plan_with<SIZE, kp, 512, 32>(d, room);
    return wide.slice ? wide : plan_with<SIZE, kp, 512, 16>(d, room);
  };
  if (k > 64) return {};
  if (k <= 16) return with(std::integral_constant<int, 16>());
  if (k <= 32) return with(std::integral_constant<int, 32>());
  return with(std::integral_constant<int, 64>());
}

}  // namespace grasp
