// The kernels' own code, run by emulate.hpp; built and called by the tests.
#define GRASP_EMULATE
#include "project.cuh"

using namespace grasp;

static std::string error;  // of the last call

template <typename T, bool LEFT, int KP, int SLICE, int BS>
static void run(const Job& job, int blocks, int clusters, unsigned seed) {
  using Kernel = Strips<T, LEFT, KP, SLICE, BS>;
  const int bytes = Kernel::At::STAGES + job.stages * Kernel::At::STAGE;
  for (int cluster = 0; cluster < clusters && error.empty(); ++cluster) {
    error = run_cluster(blocks, Kernel::THREADS, bytes, seed + cluster, [&] {
      Kernel(job, shared_now(), cluster, clusters).run();
    });
  }
}

template <typename T, int SLICE, int BS>
static void with(const Job& job, bool left, int blocks, int clusters, unsigned seed) {
  const auto rank = [&](auto kp) {
    left ? run<T, true, kp, SLICE, BS>(job, blocks, clusters, seed)
         : run<T, false, kp, SLICE, BS>(job, blocks, clusters, seed);
  };
  if (job.k <= 16) return rank(std::integral_constant<int, 16>());
  if (job.k <= 32) return rank(std::integral_constant<int, 32>());
  return rank(std::integral_constant<int, 64>());
}

// Slices of 128 or 256, so that small matrices have several; what went wrong, or nothing.
extern "C" const char* project(
    const Job* job, int kind, int left, int slice, int blocks, int clusters, unsigned seed) {
  error.clear();
  if (kind == FLOAT) {
    with<float, 128, 16>(*job, left, blocks, clusters, seed);
  } else if (kind == BFLOAT) {
    slice == 128 ? with<bf16, 128, 32>(*job, left, blocks, clusters, seed)
                 : with<bf16, 256, 16>(*job, left, blocks, clusters, seed);
  } else {
    slice == 128 ? with<fp16, 128, 32>(*job, left, blocks, clusters, seed)
                 : with<fp16, 256, 16>(*job, left, blocks, clusters, seed);
  }
  return error.c_str();
}

extern "C" void plan(int size, int d, int k, int room, Plan* found) {
  *found = size == 4 ? plan_for<4>(d, k, room) : plan_for<2>(d, k, room);
}

// Bytes that the projections have moved since the last call.
extern "C" void moved(int64_t* read, int64_t* written) {
  *read = bytes_read;
  *written = bytes_written;
  bytes_read = bytes_written = 0;
}
