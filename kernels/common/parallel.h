// Shared by the C++ backends: parallel loops over XLA's own threads, and the support rule of kernels/common/support.py.
#ifndef RADGS_KERNELS_PARALLEL_H_
#define RADGS_KERNELS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace radgs {

// Blocks are handed out by a counter. The caller works too and can finish alone, so a busy pool cannot deadlock it; it
// then waits only for blocks that another thread has already begun. Late tasks find no block and touch nothing else.
struct Work {
  std::atomic<int64_t> next{0};
  int64_t blocks = 0, done = 0;
  std::mutex mutex;
  std::condition_variable finished;
};

template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t blocks, const Body& body) {
  if (blocks == 0) return;
  auto work = std::make_shared<Work>();
  work->blocks = blocks;
  const Body* borrowed = &body;
  auto run = [work, borrowed] {
    for (int64_t block; (block = work->next.fetch_add(1)) < work->blocks;) {
      (*borrowed)(block);
      std::lock_guard<std::mutex> lock(work->mutex);
      if (++work->done == work->blocks) work->finished.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), blocks) - 1;
  // An rvalue, because the API cannot take a named callable.
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == work->blocks; });
}

// Slabs into which each of `images` outputs of `size` rows is cut, so that a few images still feed every thread.
inline int64_t SlabsPerImage(const xla::ffi::ThreadPool& pool, int64_t images, int64_t size) {
  const int64_t wanted = 4 * std::max<int64_t>(1, pool.num_threads());
  return std::clamp<int64_t>((wanted + images - 1) / std::max<int64_t>(1, images), 1, std::max<int64_t>(1, size / 4));
}

// Samples per step of the inner loops, which are plain loops over kLanes that the compiler turns into vector code.
constexpr int kLanes = 8;

// Q_FADE and Q_MAX of kernels/common/support.py, and TRACE_MAX of kernels/common/symmetric.py.
constexpr float kQFade = 12.25f, kQMax = 16.0f;
constexpr float kTraceMax = 1e12f;

// Integers in [low, high] and [0, size), from real bounds; empty (last < first) where a bound is NaN. The margin keeps
// samples that rounding would push over the edge of the support, where the weight is close to 0 anyway.
struct Interval {
  int64_t first = 0, last = -1;
};

inline Interval Clip(double low, double high, int64_t size) {
  low = std::max(std::ceil(low - 1e-3), 0.0);
  high = std::min(std::floor(high + 1e-3), static_cast<double>(size - 1));
  if (!(low <= high)) return {};
  return {static_cast<int64_t>(low), static_cast<int64_t>(high)};
}

}  // namespace radgs

#endif  // RADGS_KERNELS_PARALLEL_H_
