#include "bindings.h"
#include "orthonormalize.cuh"

namespace grasp {

static_assert(sizeof(Talls) <= 32764, "more than kernel arguments can hold");

template <typename T, int KP>
__global__ void __launch_bounds__(TALL_THREADS)
    orthonormalize_kernel(const __grid_constant__ Talls talls) {
  extern __shared__ double doubles[];
  orthonormalize<T, KP>(talls.matrices[blockIdx.x], doubles);
}

template <typename T, int KP>
static cudaError_t launch(const Talls& talls, int longest, const Device& device, cudaStream_t s) {
  const int bytes = (TALL_THREADS / 32 * KP + KP + longest) * 8;
  if (bytes > device.shared_per_block) return cudaErrorInvalidConfiguration;
  const auto kernel = orthonormalize_kernel<T, KP>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<talls.count, TALL_THREADS, bytes, s>>>(talls);
  return cudaGetLastError();
}

template <typename T>
static cudaError_t with_rank(
    const Talls& talls, int k, int longest, const Device& device, cudaStream_t s) {
  if (k <= 16) return launch<T, 16>(talls, longest, device, s);
  if (k <= 32) return launch<T, 32>(talls, longest, device, s);
  return launch<T, 64>(talls, longest, device, s);
}

cudaError_t orthonormalize(
    const Talls& talls, int kind, int k, int longest, const Device& device, cudaStream_t s) {
  if (kind == FLOAT) return with_rank<float>(talls, k, longest, device, s);
  if (kind == BFLOAT) return with_rank<bf16>(talls, k, longest, device, s);
  return with_rank<fp16>(talls, k, longest, device, s);
}

}  // namespace grasp
