// What bindings.cpp and the kernels share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace grasp {

struct Job;
struct Table;

struct Device {
  int major, multiprocessors;
  int shared, shared_per_block;  // bytes of a multiprocessor, and of a block at most
};

// Whether `project` has room for the matrix on this device; it fails where not.
bool project_fits(const Job& job, bool left, const Device& device);
cudaError_t project(const Job& job, bool half, bool left, const Device& device, cudaStream_t s);
cudaError_t project_list(const Table& table, int strips, int k, cudaStream_t s);

}  // namespace grasp
