// What bindings.cpp and the kernels share.
#pragma once

#include <cuda_runtime.h>

#include "job.h"

namespace grasp {

struct Device {
  int major;
  int shared_per_block;  // bytes at most
};

// Strips that the matrix is cut into; 0 where `project` has no room for it on this device.
int project_strips(const Job& job, Kind kind, const Device& device);
cudaError_t project(const Job& job, Kind kind, bool left, const Device& device, cudaStream_t s);

}  // namespace grasp
