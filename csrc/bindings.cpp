// The library's operators, for any torch from 2.11 and any Python: LibTorch's stable ABI alone.
// Their schemas, and all checks of arguments, stand in Python.
#define TORCH_TARGET_VERSION 0x020b000000000000
#define USE_CUDA
#define GRASP_HOST

#include "bindings.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <map>
#include <mutex>
#include <vector>

#include "project.cuh"
#include "project_list.cuh"

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
  device.multiprocessors = read(cudaDevAttrMultiProcessorCount);
  device.shared = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return known.emplace(index, device).first->second;
}

static cudaStream_t stream_of(int index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

static Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return FLOAT;
    case torch::headeronly::ScalarType::BFloat16:
      return BFLOAT;
    case torch::headeronly::ScalarType::Half:
      return HALF;
    default:
      STD_TORCH_CHECK(false, "grasp: the kernels take fp32, bf16 and fp16");
  }
}

// One matrix as `grasp_kernels/matrices.py` lays it out: two addresses, then a `Row`.
struct Row {
  int64_t in, out, basis, C, n, d, k, in_step, out_step, basis_d, basis_k, C_n, C_k, kind, left;
};

static bool is_aligned(const Row& r) {
  // Chunks of 16 bytes: 8 elements of 16 bits.
  const auto ok = [](int64_t p, int64_t step) { return p % 16 == 0 && step % 8 == 0; };
  return ok(r.in, r.in_step) && ok(r.out, r.out_step) && (r.left ? r.n : r.d) % 8 == 0;
}

constexpr int64_t LARGE = 1 << 20;  // elements from which a matrix gets a launch of its own

static void project_all(Tensor rows, int64_t index, int64_t energies) {
  constexpr int64_t COLUMNS = sizeof(Row) / sizeof(int64_t);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == COLUMNS && rows.is_contiguous(),
                  "grasp: rows of ", COLUMNS, " numbers are needed");
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  const cudaStream_t stream = stream_of(index);
  Table table;
  table.count = 0;
  int strips = 0, widest = 0;
  int64_t before = 0;  // strips of SIDE positions up to here: where a matrix's energies are
  const auto energies_here = [&] {
    return energies ? reinterpret_cast<float*>(energies) + 2 * before : nullptr;
  };
  const auto launch = [&] {
    if (table.count) check(project_list(table, strips, widest, stream), "project_list");
    table.count = strips = widest = 0;
  };
  const Row* row = static_cast<const Row*>(rows.data_ptr());
  for (const Row* const end = row + rows.size(0); row != end; ++row) {
    const Row& r = *row;
    if (r.n == 0 || r.d == 0) continue;
    const auto in = reinterpret_cast<void*>(r.in), out = reinterpret_cast<void*>(r.out);
    const auto basis = reinterpret_cast<const float*>(r.basis);
    const auto C = reinterpret_cast<const float*>(r.C);
    const int n = r.n, d = r.d, k = r.k;
    const Job job{in,        out,   basis, C, r.in_step, r.out_step, r.basis_d,
                  r.basis_k, r.C_n, r.C_k, n, d,         k,          0,
                  energies_here()};
    const int own = (n + SIDE - 1) / SIDE;
    if (r.kind != FLOAT && r.n * r.d >= LARGE && is_aligned(r) &&
        project_fits(job, r.left, device)) {
      check(project(job, r.kind == HALF, r.left, device, stream), "project");
      if (energies) launch();  // those of what follows lie elsewhere
      before += own;
      continue;
    }
    STD_TORCH_CHECK(std::max(r.in_step, r.out_step) <= INT32_MAX, "grasp: rows too far apart");
    if (table.count == ENTRIES) launch();
    if (table.count == 0) table.energies = energies_here();
    table.entries[table.count++] = {in,
                                    out,
                                    basis,
                                    C,
                                    static_cast<int>(r.in_step),
                                    static_cast<int>(r.out_step),
                                    n,
                                    d,
                                    strips,
                                    static_cast<short>(k),
                                    static_cast<unsigned char>(r.kind),
                                    r.left != 0,
                                    C != nullptr && r.C_n == 1 && r.C_k == n};
    strips += own;
    before += own;
    widest = std::max(widest, k);
  }
  launch();
}

}  // namespace grasp

STABLE_TORCH_LIBRARY_IMPL(grasp_native, CPU, m) {  // where the table of matrices is
  m.impl("project_all", TORCH_BOX(&grasp::project_all));
}
