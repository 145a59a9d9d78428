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

#include <map>
#include <mutex>
#include <vector>

#include "orthonormalize.cuh"
#include "project.cuh"
#include "project_list.cuh"

using torch::stable::Tensor;

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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
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

// A matrix whose rows are contiguous: `T`, or its transpose from the other side.
struct Matrix {
  const void* in;
  void* out;
  int64_t in_step, out_step, rows, columns;
  bool left;
};

static Matrix matrix_of(const Tensor& T, const Tensor& out, bool left) {
  const int flip = T.stride(1) != 1 || out.stride(1) != 1;
  return {T.data_ptr(),
          out.data_ptr(),
          T.stride(flip),
          out.stride(flip),
          T.size(flip),
          T.size(1 - flip),
          left != bool(flip)};
}

static bool is_aligned(const Matrix& m) {
  // Chunks of 16 bytes: 8 elements of 16 bits.
  const auto ok = [](const void* p, int64_t step) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && step % 8 == 0;
  };
  return ok(m.in, m.in_step) && ok(m.out, m.out_step) && m.columns % 8 == 0;
}

constexpr int64_t LARGE = 1 << 20;  // elements from which a matrix gets a launch of its own

static void project_all(std::vector<Tensor> Ts, std::vector<Tensor> outs,
                        std::vector<Tensor> bases, std::vector<Tensor> Cs, bool left) {
  if (Ts.empty()) return;
  const int index = Ts[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  const cudaStream_t stream = stream_of(index);
  Table table;
  table.count = 0;
  int strips = 0, widest = 0;
  const auto launch = [&] {
    if (table.count) check(project_list(table, strips, widest, stream), "project_list");
    table.count = strips = widest = 0;
  };
  for (size_t i = 0; i < Ts.size(); ++i) {
    const Matrix m = matrix_of(Ts[i], outs[i], left);
    const float* C = Cs.empty() ? nullptr : static_cast<const float*>(Cs[i].data_ptr());
    // C has a position along its first dimension on the right side, along its second on the left,
    // whichever way T itself is stored.
    const int64_t C_n = C ? Cs[i].stride(left) : 0, C_k = C ? Cs[i].stride(!left) : 0;
    const int n = m.left ? m.columns : m.rows, d = m.left ? m.rows : m.columns;
    const int k = bases[i].size(1);
    const float* basis = static_cast<const float*>(bases[i].data_ptr());
    const Kind kind = kind_of(Ts[i]);
    if (n == 0 || d == 0) continue;
    const Job job{m.in, m.out, basis, C, m.in_step, m.out_step, bases[i].stride(0),
                  bases[i].stride(1), C_n, C_k, n, d, k, 0};
    if (kind != FLOAT && int64_t(n) * d >= LARGE && is_aligned(m) &&
        project_fits(job, m.left, device)) {
      check(project(job, kind == HALF, m.left, device, stream), "project");
      continue;
    }
    STD_TORCH_CHECK(std::max(m.in_step, m.out_step) <= INT32_MAX, "grasp: rows too far apart");
    if (table.count == ENTRIES) launch();
    table.entries[table.count++] = {const_cast<void*>(m.in),
                                    m.out,
                                    basis,
                                    C,
                                    static_cast<int>(m.in_step),
                                    static_cast<int>(m.out_step),
                                    n,
                                    d,
                                    strips,
                                    static_cast<short>(k),
                                    static_cast<unsigned char>(kind),
                                    m.left,
                                    left};
    strips += (n + SIDE - 1) / SIDE;
    widest = std::max(widest, k);
  }
  launch();
}

static void orthonormalize_all(std::vector<Tensor> Ws, std::vector<Tensor> Qs,
                               std::vector<Tensor> ranks, std::vector<double> rtols) {
  if (Ws.empty()) return;
  const int index = Ws[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Device& device = device_of(index);
  const cudaStream_t stream = stream_of(index);
  for (const Kind kind : {FLOAT, BFLOAT, HALF}) {
    Talls talls;
    talls.count = 0;
    int widest = 0, longest = 0;
    const auto launch = [&] {
      if (talls.count) {
        check(orthonormalize(talls, kind, widest, longest, device, stream), "orthonormalize");
      }
      talls.count = widest = longest = 0;
    };
    for (size_t i = 0; i < Ws.size(); ++i) {
      if (kind_of(Ws[i]) != kind) continue;
      if (talls.count == TALLS) launch();
      const int d = Ws[i].size(0), k = Ws[i].size(1);
      talls.matrices[talls.count++] = {Ws[i].data_ptr(),
                                       static_cast<double*>(Qs[i].data_ptr()),
                                       static_cast<int64_t*>(ranks[i].data_ptr()),
                                       Ws[i].stride(0),
                                       Ws[i].stride(1),
                                       rtols[i],
                                       d,
                                       k};
      widest = std::max(widest, k);
      longest = std::max(longest, d);
    }
    launch();
  }
}

}  // namespace grasp

STABLE_TORCH_LIBRARY_IMPL(grasp_native, CUDA, m) {
  m.impl("project_all", TORCH_BOX(&grasp::project_all));
  m.impl("orthonormalize_all", TORCH_BOX(&grasp::orthonormalize_all));
}
