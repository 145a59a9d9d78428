// What bindings.cpp and the kernels share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace grasp {

struct Job;

struct Device {
  int major, multiprocessors;
  int shared, shared_per_block;  // bytes of a multiprocessor, and of a block at most
};

cudaError_t project(const Job& job, bool half, bool left, const Device& device, cudaStream_t stream);

}  // namespace grasp
