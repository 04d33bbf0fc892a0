// What the C++ backends share: parallel loops over XLA's own threads, and the support rule of kernels/support.py.
#ifndef RADGS_KERNELS_PARALLEL_H_
#define RADGS_KERNELS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
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

constexpr float kQFade = 12.25f, kQMax = 16.0f;

// q clipped to the range where the weight varies; NaN counts as outside, where the weight is 0.
inline float ClipQ(float q) {
  q = q < kQMax ? q : kQMax;
  return q > 0.0f ? q : 0.0f;
}

// exp(-q / 2) for q in [0, 16], relative error below 2e-7: argument reduction by a two-part ln 2, then a polynomial
// (a minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2).
inline float ExpMinusHalf(float q) {
  const float n = std::nearbyint(q * -0.72134752f);
  const float r = (q * -0.5f - n * 0.693359375f) + n * 2.12194440e-4f;
  const float r2 = r * r;  // Estrin's order, for its shorter chain
  const float p = (0.49999994f + 0.1666652f * r) + r2 * ((0.0416684f + 0.008368852f * r) + r2 * 0.0013814318f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return (p * r2 + (1.0f + r)) * scale;
}

// support.weight for a clipped q.
inline float Weight(float q) {
  float s = (kQMax - q) * (1.0f / (kQMax - kQFade));
  s = s < 1.0f ? s : 1.0f;
  return ExpMinusHalf(q) * (s * s * (3.0f - 2.0f * s));
}

// support.weight_and_slope for a clipped q.
inline void WeightAndSlope(float q, float& weight, float& slope) {
  float s = (kQMax - q) * (1.0f / (kQMax - kQFade));
  s = s < 1.0f ? s : 1.0f;
  const float gaussian = ExpMinusHalf(q), fade = s * s * (3.0f - 2.0f * s);
  weight = gaussian * fade;
  slope = gaussian * (s * (s - 1.0f) * (6.0f / (kQMax - kQFade)) - 0.5f * fade);
}

inline bool AllFinite(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

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
