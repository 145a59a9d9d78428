#include "project.cuh"

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

template <typename T, bool LEFT, int KP, int SLICE>
static cudaError_t launch(const Job& job, const Plan& plan, cudaStream_t stream) {
  constexpr int BS = strip_of(sizeof(T), SLICE);
  if constexpr (!Layout<sizeof(T), KP, SLICE, BS>::POSSIBLE) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = project_kernel<T, LEFT, KP, SLICE, BS>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes);
    if (error != cudaSuccess) return error;
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
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    config.gridDim = dim3(plan.blocks * std::min(clusters, (job.n + BS - 1) / BS));
    return cudaLaunchKernelEx(&config, kernel, job);
  }
}

template <typename T, bool LEFT, int KP>
static cudaError_t with_slice(const Job& job, const Plan& plan, cudaStream_t stream) {
  if (plan.slice == 512) return launch<T, LEFT, KP, 512>(job, plan, stream);
  if (plan.slice == 1024) return launch<T, LEFT, KP, 1024>(job, plan, stream);
  return launch<T, LEFT, KP, 2048>(job, plan, stream);
}

template <typename T, bool LEFT>
static cudaError_t with_rank(const Job& job, const Plan& plan, cudaStream_t stream) {
  if (plan.kp == 16) return with_slice<T, LEFT, 16>(job, plan, stream);
  if (plan.kp == 32) return with_slice<T, LEFT, 32>(job, plan, stream);
  return with_slice<T, LEFT, 64>(job, plan, stream);
}

template <typename T>
static cudaError_t with_side(Job job, bool left, const Device& device, cudaStream_t stream) {
  const Plan plan = plan_for<sizeof(T)>(job.d, job.k, device.shared_per_block);
  if (device.major < 9 || plan.slice == 0) return cudaErrorInvalidConfiguration;
  job.width = plan.width;
  job.stages = plan.stages;
  return left ? with_rank<T, true>(job, plan, stream) : with_rank<T, false>(job, plan, stream);
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
