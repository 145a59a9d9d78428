// The library's operators, for any torch from 2.11 and any Python: LibTorch's stable ABI alone.
// Their schemas, and all checks of arguments, stand in Python.
#define TORCH_TARGET_VERSION 0x020b000000000000
#define USE_CUDA

#include "bindings.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <map>
#include <mutex>

using torch::stable::Tensor;

// The CUDA that this was built with and the newest that the driver runs, 1000 for each major
// version; 0 where there is no driver. `native.missing` asks before any operator runs.
extern "C" __attribute__((visibility("default"))) void grasp_cuda_versions(int* built, int* driver) {
  *built = CUDART_VERSION;
  *driver = 0;
  cudaDriverGetVersion(driver);
}

namespace grasp {

static void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "grasp: ", what, " failed: ", cudaGetErrorString(error));
}

static const Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto read = [index](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
    return value;
  };
  Device device{};
  device.major = read(cudaDevAttrComputeCapabilityMajor);
  device.shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return known.emplace(index, device).first->second;
}

static cudaStream_t stream_of(int index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// One matrix as `grasp_kernels/matrices.py` lays it out: two addresses, then a `Row`.
struct Row {
  int64_t in, out, basis, C, n, d, k, in_step, out_step, basis_d, basis_k, C_n, C_k, kind, left,
      vector;
};

// Rows of whole 16 bytes, and d in whole matrix instructions.
static bool is_aligned(const Row& r) {
  const int64_t size = r.kind == FLOAT ? 4 : 2;
  const auto ok = [size](int64_t p, int64_t step) { return p % 16 == 0 && step * size % 16 == 0; };
  return ok(r.in, r.in_step) && ok(r.out, r.out_step) && r.d % 32 == 0 &&
         (r.left == 0 || r.n * size % 16 == 0);
}

// Each row a launch; its energies take one pair for each of its strips.
static void project_all(Tensor rows, int64_t index, int64_t energies) {
  constexpr int64_t COLUMNS = sizeof(Row) / sizeof(int64_t);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == COLUMNS && rows.is_contiguous(),
                  "grasp: rows of ", COLUMNS, " numbers are needed");
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  const cudaStream_t stream = stream_of(index);
  int64_t before = 0;  // strips up to here
  const Row* row = static_cast<const Row*>(rows.data_ptr());
  for (const Row* const end = row + rows.size(0); row != end; ++row) {
    const Row& r = *row;
    Job job{};
    job.in = reinterpret_cast<void*>(r.in);
    job.out = reinterpret_cast<void*>(r.out);
    job.basis = reinterpret_cast<const float*>(r.basis);
    job.C = reinterpret_cast<const float*>(r.C);
    job.in_step = r.in_step, job.out_step = r.out_step;
    job.basis_d = r.basis_d, job.basis_k = r.basis_k, job.C_n = r.C_n, job.C_k = r.C_k;
    job.n = r.n, job.d = r.d, job.k = r.k;
    if (energies) job.energies = reinterpret_cast<float*>(energies) + 2 * before;
    const Kind kind = static_cast<Kind>(r.kind);
    const int strips = project_strips(job, kind, device);
    STD_TORCH_CHECK(strips > 0 && is_aligned(r), "grasp: no kernel takes a ", r.n, " by ", r.d,
                    " matrix with k = ", r.k, " on this device as it lies; project it by triton");
    check(project(job, kind, r.left != 0, device, stream), "project");
    before += strips;
  }
}

}  // namespace grasp

STABLE_TORCH_LIBRARY_IMPL(grasp_native, CPU, m) {  // where the table of matrices is
  m.impl("project_all", TORCH_BOX(&grasp::project_all));
}
