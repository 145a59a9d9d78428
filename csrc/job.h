// What the host asks of a kernel, in plain C++.
#pragma once

#include <cstdint>

namespace grasp {

enum Kind : int { FLOAT = 0, BFLOAT = 1, HALF = 2 };  // of elements

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
  float* energies;  // of each cluster ‖T‖² and what of it lay in the basis, added to; or null
};

}  // namespace grasp
