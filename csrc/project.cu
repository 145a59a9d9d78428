#include "project.cuh"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <type_traits>

#include "bindings.h"

namespace grasp {

template <typename T, bool LEFT, int KP, int SLICE, int BS>
__global__ void __launch_bounds__(Strips<T, LEFT, KP, SLICE, BS>::THREADS, 1)
    project_kernel(const __grid_constant__ Job job) {
#if __CUDA_ARCH__ >= 900  // clusters and bulk copies
  extern __shared__ __align__(128) char shared[];
  const int blocks = cluster_size();
  Strips<T, LEFT, KP, SLICE, BS>(job, shared, blockIdx.x / blocks, gridDim.x / blocks).run();
#endif
}

// Clusters that run at once, asked for once: a launch is to cost the host a few microseconds.
static cudaError_t clusters_at_once(
    void (*kernel)(Job), const cudaLaunchConfig_t& config, int room, int& clusters) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 4>, int> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::array<int64_t, 4> key = {reinterpret_cast<int64_t>(kernel), device,
                                      int64_t(config.gridDim.x), int64_t(config.dynamicSmemBytes)};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    clusters = found->second;
    return cudaSuccess;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaSuccess) known[key] = clusters;
  return error;
}

template <typename T, bool LEFT, int KP, int SLICE, int BS>
static cudaError_t launch(const Job& job, const Plan& plan, int room, cudaStream_t stream) {
  if constexpr (!Layout<sizeof(T), KP, SLICE, BS>::POSSIBLE) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = project_kernel<T, LEFT, KP, SLICE, BS>;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(Strips<T, LEFT, KP, SLICE, BS>::THREADS);
    config.gridDim = dim3(plan.blocks);
    config.dynamicSmemBytes = plan.bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = clusters_at_once(kernel, config, room, clusters);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    config.gridDim = dim3(plan.blocks * std::min(clusters, (job.n + BS - 1) / BS));
    return cudaLaunchKernelEx(&config, kernel, job);
  }
}

template <typename T, bool LEFT, int KP>
static cudaError_t with_slice(const Job& job, const Plan& plan, int room, cudaStream_t stream) {
  if (plan.strip == 32) return launch<T, LEFT, KP, 512, 32>(job, plan, room, stream);
  if (plan.slice == 512) return launch<T, LEFT, KP, 512, 16>(job, plan, room, stream);
  if (plan.slice == 1024) return launch<T, LEFT, KP, 1024, 16>(job, plan, room, stream);
  return launch<T, LEFT, KP, 2048, 16>(job, plan, room, stream);
}

template <typename T, bool LEFT>
static cudaError_t with_rank(const Job& job, const Plan& plan, int room, cudaStream_t stream) {
  if (plan.kp == 16) return with_slice<T, LEFT, 16>(job, plan, room, stream);
  if (plan.kp == 32) return with_slice<T, LEFT, 32>(job, plan, room, stream);
  return with_slice<T, LEFT, 64>(job, plan, room, stream);
}

template <typename T>
static cudaError_t with_side(Job job, bool left, const Device& device, cudaStream_t stream) {
  const int room = device.shared_per_block;
  const Plan plan = plan_for<sizeof(T)>(job.d, job.k, room);
  if (device.major < 9 || plan.slice == 0) return cudaErrorInvalidConfiguration;
  job.width = plan.width;
  job.stages = plan.stages;
  return left ? with_rank<T, true>(job, plan, room, stream)
              : with_rank<T, false>(job, plan, room, stream);
}

int project_strips(const Job& job, Kind kind, const Device& device) {
  const int room = device.shared_per_block;
  const Plan plan =
      kind == FLOAT ? plan_for<4>(job.d, job.k, room) : plan_for<2>(job.d, job.k, room);
  return plan.slice == 0 || device.major < 9 ? 0 : (job.n + plan.strip - 1) / plan.strip;
}

cudaError_t project(const Job& job, Kind kind, bool left, const Device& device, cudaStream_t s) {
  if (kind == FLOAT) return with_side<float>(job, left, device, s);
  return kind == HALF ? with_side<fp16>(job, left, device, s)
                      : with_side<bf16>(job, left, device, s);
}

}  // namespace grasp
