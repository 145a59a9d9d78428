#include "project.cuh"

#include <type_traits>

#include "bindings.h"

namespace grasp {

constexpr int BS = 32;
constexpr int LARGEST_CLUSTER = 16;  // above 8 only where the device allows it

// Two blocks on a multiprocessor are what shared memory is laid out for: registers for no more, so
// that none is spilled.
template <typename T, bool LEFT, int KP>
__global__ void __launch_bounds__(THREADS, 2) project_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(16) char shared[];
  const int blocks = cluster_size();
  project_strips<T, LEFT, KP, BS>(job, shared, blockIdx.x / blocks, gridDim.x / blocks);
}

// The smallest cluster whose blocks leave room for a second one on a multiprocessor; failing that,
// the smallest whose blocks fit at all; 0 where none does.
template <bool LEFT, int KP>
static int cluster_for(Job& job, int room, int per_multiprocessor, int largest) {
  for (const int limit : {per_multiprocessor / 2, room}) {
    for (int blocks = 1; blocks <= largest; blocks *= 2) {
      job.slice = (job.d + blocks * 16 - 1) / (blocks * 16) * 16;
      if (Layout<LEFT, KP, BS>(job.slice).bytes <= limit) return blocks;
    }
  }
  return 0;
}

template <typename T, bool LEFT, int KP>
static cudaError_t launch(Job job, const Device& device, cudaStream_t stream) {
  const int largest = device.major >= 9 ? LARGEST_CLUSTER : 1;
  const int blocks =
      cluster_for<LEFT, KP>(job, device.shared_per_block, device.shared, largest);
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  const auto kernel = project_kernel<T, LEFT, KP>;
  const int bytes = Layout<LEFT, KP, BS>(job.slice).bytes;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && blocks > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(THREADS);
  config.gridDim = dim3(blocks);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  int clusters = device.multiprocessors * std::max(1, device.shared / bytes);
  if (device.major >= 9) {
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
  }
  config.gridDim = dim3(blocks * std::min(clusters, (job.n + BS - 1) / BS));
  return cudaLaunchKernelEx(&config, kernel, job);
}

template <typename T, bool LEFT>
static cudaError_t with_rank(const Job& job, const Device& device, cudaStream_t stream) {
  if (job.k <= 16) return launch<T, LEFT, 16>(job, device, stream);
  if (job.k <= 32) return launch<T, LEFT, 32>(job, device, stream);
  return launch<T, LEFT, 64>(job, device, stream);
}

bool project_fits(const Job& given, bool left, const Device& device) {
  Job job = given;
  const int largest = device.major >= 9 ? LARGEST_CLUSTER : 1;
  const auto fits = [&](auto side, auto rank) {
    return cluster_for<decltype(side)::value, decltype(rank)::value>(
               job, device.shared_per_block, device.shared, largest) != 0;
  };
  const auto with_side = [&](auto side) {
    if (job.k <= 16) return fits(side, std::integral_constant<int, 16>());
    if (job.k <= 32) return fits(side, std::integral_constant<int, 32>());
    return job.k <= 64 && fits(side, std::integral_constant<int, 64>());
  };
  return left ? with_side(std::true_type()) : with_side(std::false_type());
}

cudaError_t project(const Job& job, bool half, bool left, const Device& device, cudaStream_t s) {
  if (half) {
    return left ? with_rank<fp16, true>(job, device, s) : with_rank<fp16, false>(job, device, s);
  }
  return left ? with_rank<bf16, true>(job, device, s) : with_rank<bf16, false>(job, device, s);
}

}  // namespace grasp
