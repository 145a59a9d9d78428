// The kernels' own code, run by emulate.hpp; built and called by the tests.
#define GRASP_EMULATE
#include "project.cuh"
#include "project_list.cuh"

using namespace grasp;

template <typename T, bool LEFT, int KP>
static int run(const Job& job, int blocks, int clusters) {
  constexpr int BS = 32;
  const int bytes = Layout<LEFT, KP, BS>(job.slice).bytes;
  try {
    for (int cluster = 0; cluster < clusters; ++cluster) {
      run_cluster(blocks, THREADS, bytes, [&](int) {
        project_strips<T, LEFT, KP, BS>(job, shared_now(), cluster, clusters);
      });
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

template <typename T, bool LEFT>
static int with_rank(const Job& job, int blocks, int clusters) {
  if (job.k <= 16) return run<T, LEFT, 16>(job, blocks, clusters);
  if (job.k <= 32) return run<T, LEFT, 32>(job, blocks, clusters);
  return run<T, LEFT, 64>(job, blocks, clusters);
}

extern "C" int project(const Job* job, int half, int left, int blocks, int clusters) {
  if (half) {
    return left ? with_rank<fp16, true>(*job, blocks, clusters)
                : with_rank<fp16, false>(*job, blocks, clusters);
  }
  return left ? with_rank<bf16, true>(*job, blocks, clusters)
              : with_rank<bf16, false>(*job, blocks, clusters);
}

template <int KP>
static int run_list(const Table& table, int strips) {
  try {
    for (int strip = 0; strip < strips; ++strip) {
      run_cluster(1, LIST_THREADS, LIST_THREADS / 32 * SIDE * KP * 4, [&](int) {
        project_list<KP>(table, strip, reinterpret_cast<float*>(shared_now()));
      });
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

extern "C" int project_entries(const Entry* entries, int count, int strips, int k,
                               float* energies) {
  Table table;
  table.energies = energies;
  std::memcpy(table.entries, entries, sizeof(Entry) * count);
  table.count = count;
  if (k <= 8) return run_list<8>(table, strips);
  if (k <= 16) return run_list<16>(table, strips);
  return k <= 32 ? run_list<32>(table, strips) : run_list<64>(table, strips);
}

// What the projections have moved since the last call.
extern "C" void moved(int64_t* read, int64_t* written) {
  *read = bytes_read;
  *written = bytes_written;
  bytes_read = bytes_written = 0;
}
