#include "bindings.h"
#include "project_list.cuh"

namespace grasp {

static_assert(sizeof(Table) <= 32764, "more than kernel arguments can hold");

template <int KP>
__global__ void __launch_bounds__(LIST_THREADS) list_kernel(const __grid_constant__ Table table) {
  extern __shared__ float coefficients[];
  project_list<KP>(table, blockIdx.x, coefficients);
}

template <int KP>
static cudaError_t launch(const Table& table, int strips, cudaStream_t stream) {
  list_kernel<KP><<<strips, LIST_THREADS, LIST_THREADS / 32 * SIDE * KP * 4, stream>>>(table);
  return cudaGetLastError();
}

cudaError_t project_list(const Table& table, int strips, int k, cudaStream_t stream) {
  if (k <= 8) return launch<8>(table, strips, stream);
  if (k <= 16) return launch<16>(table, strips, stream);
  return k <= 32 ? launch<32>(table, strips, stream) : launch<64>(table, strips, stream);
}

}  // namespace grasp
