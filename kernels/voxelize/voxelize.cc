// `voxelize` and its gradient on the CPU: rows of voxels in vector registers, work split over XLA's own threads.
//
// The quadratic form is completed to squares, axis by axis, in units that make the weight 2^-e before the fade:
//   e = a u^2 + b v^2 + w^2,  u = x - m_x,  v = y - centre of y, given x,  w = root_z (z - centre of z, given x and y).
// It gives the exact range of every axis inside q < 16, and a row of voxels on which e is one fused multiply-add. What
// needs range (bounds, offsets from means) is in double once per plane or column; rows and voxels are in float.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using radgs::Clip;
using radgs::Interval;
using radgs::kLanes;

constexpr int kSums = 10;
constexpr double kScale = 0.72134752044448170368;  // e / q, that is log2(e) / 2
constexpr float kEMax = radgs::kQMax * kScale;
constexpr float kAtEdge = 3.3546265e-4f;  // exp(-kQMax / 2), that is 2^-kEMax

struct Sizes {
  int64_t x, y, z;
};

struct Gaussian {
  int64_t first, last;  // planes; last < first for a Gaussian that is not drawn, whose other members are not set
  float density, mean[3], half_z, root_z;
  // y is centred on m_y - shift_y u, z on m_z - shift_zx u - shift_zy (y - m_y); half-widths in sqrt(kEMax - e so far).
  double a, b, shift_y, half_y, shift_zx, shift_zy;
};

void Prepare(float density, const float* mean, const float* precision, const Sizes& sizes, Gaussian& g) {
  g.first = 0, g.last = -1;
  float nothing = 0.0f;  // NaN if a number is not finite
  for (int i = 0; i < 3; ++i) nothing += 0.0f * mean[i];
  for (int i = 0; i < 6; ++i) nothing += 0.0f * precision[i];
  if (nothing != 0.0f) return;
  const double xx = kScale * precision[0], xy = kScale * precision[1], xz = kScale * precision[2];
  const double yy = kScale * precision[3], yz = kScale * precision[4], zz = kScale * precision[5];
  const double variance_z = 1.0 / zz;
  g.shift_zx = xz * variance_z, g.shift_zy = yz * variance_z;
  g.b = yy - yz * g.shift_zy;
  const double variance_y = 1.0 / g.b;
  g.shift_y = (xy - yz * g.shift_zx) * variance_y;
  g.a = xx - xz * g.shift_zx - g.b * g.shift_y * g.shift_y;
  // Shifts have to fit a float; only a precision that is singular in float has larger ones.
  const bool fits = std::abs(g.shift_zx) < 1e30 && std::abs(g.shift_zy) < 1e30;
  if (!(zz > 0.0 && g.b > 0.0 && g.a > 0.0 && fits && xx + yy + zz < kScale * radgs::kTraceMax)) return;
  const double variance_x = 1.0 / g.a, tilt = g.shift_zx - g.shift_zy * g.shift_y;
  const auto misses = [](double mean, int64_t size, double variance) {
    const double past = std::max({-mean, mean - static_cast<double>(size - 1), 0.0});
    return past * past > kEMax * variance;
  };
  if (misses(mean[1], sizes.y, variance_y + g.shift_y * g.shift_y * variance_x)) return;
  if (misses(mean[2], sizes.z, variance_z + g.shift_zy * g.shift_zy * variance_y + tilt * tilt * variance_x)) return;
  g.density = density;
  std::copy(mean, mean + 3, g.mean);
  g.half_y = std::sqrt(variance_y);
  g.half_z = static_cast<float>(std::sqrt(variance_z)), g.root_z = static_cast<float>(std::sqrt(zz));
  const double half_x = std::sqrt(kEMax * variance_x);
  const Interval planes = Clip(mean[0] - half_x, mean[0] + half_x, sizes.x);
  g.first = planes.first, g.last = planes.last;
}

// kLanes numbers in a register: written out, for GCC leaves many loops of these bodies in scalars.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Integers = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Offsets = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));

template <typename To, typename From>
inline To Load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

template <typename From, typename To>
inline void Store(const From& from, To* to) {
  std::memcpy(to, &from, sizeof from);
}

#ifdef __AVX2__
inline Lanes Smaller(const Lanes& a, const Lanes& b) { return _mm256_min_ps(a, b); }
inline Lanes Larger(const Lanes& a, const Lanes& b) { return _mm256_max_ps(a, b); }
inline Lanes Floor(const Lanes& a) { return _mm256_floor_ps(a); }
inline Lanes Ceil(const Lanes& a) { return _mm256_ceil_ps(a); }
inline Lanes Sqrt(const Lanes& a) { return _mm256_sqrt_ps(a); }
#else
template <typename Function>
inline Lanes Each(const Lanes& a, const Function& function) {
  Lanes result;
  for (int l = 0; l < kLanes; ++l) result[l] = function(a[l]);
  return result;
}
inline Lanes Smaller(const Lanes& a, const Lanes& b) { return a < b ? a : b; }
inline Lanes Larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }
inline Lanes Floor(const Lanes& a) { return Each(a, [](float x) { return std::floor(x); }); }
inline Lanes Ceil(const Lanes& a) { return Each(a, [](float x) { return std::ceil(x); }); }
inline Lanes Sqrt(const Lanes& a) { return Each(a, [](float x) { return std::sqrt(x); }); }
#endif

// Rows of voxels inside the support, each covered by `runs` vectors from its first voxel on. Voxels of a run past the
// support have weight 0, so they need no mask.
constexpr int kRows = 128;
struct Rows {
  int64_t voxel[kRows];
  float t[kRows];  // kEMax - e, without w^2
  float w[kRows];  // of the first voxel
  float u[kRows], v[kRows];
  int32_t runs[kRows];
};

struct RowList {
  int32_t row[kRows];
};

constexpr RowList kAllRows = [] {
  RowList list = {};
  for (int i = 0; i < kRows; ++i) list.row[i] = i;
  return list;
}();

// Calls body(rows, list, count, skipped, room): row list[i], i < count, has kLanes voxels, of which `room` lie in the
// volume, `skipped` voxels after its first.
template <typename Body>
void ForEachRun(const Rows& rows, int count, bool one_run, int64_t size_z, const Body& body) {
  const int32_t* list = kAllRows.row;
  RowList longer;
  for (int64_t run = 0; count > 0; ++run) {
    body(rows, list, count, run * kLanes, std::min<int64_t>(kLanes, size_z - run * kLanes));
    if (one_run) break;
    int left = 0;
    for (int i = 0; i < count; ++i) {
      const int32_t row = list[i];
      longer.row[left] = row;
      left += rows.runs[row] > run + 1;
    }
    list = longer.row, count = left;
  }
}

// Runs of all rows of a Gaussian in the planes of `slab`. Planes and rows are found kLanes at a time, and rows are
// collected over planes, which keeps all arithmetic in vectors and long loops however short rows and columns are.
template <typename Body>
void ForEachRun(const Gaussian& g, Interval slab, const Sizes& sizes, const Body& body) {
  constexpr double kMargin = 1e-3;  // as in Clip
  constexpr float kCount = kLanes;
  const double size_y = static_cast<double>(sizes.y), size_z = static_cast<double>(sizes.z);
  const bool one_run = std::sqrt(kEMax) * g.half_z < 0.5f * kCount - 2.0f * static_cast<float>(kMargin);
  Lanes index;
  Offsets below;
  for (int l = 0; l < kLanes; ++l) index[l] = static_cast<float>(l), below[l] = l * sizes.z;
  const Lanes down = static_cast<float>(g.shift_zy) * index;
  const float b = static_cast<float>(g.b);
  Rows rows;
  int count = 0;
  const int64_t last = std::min(g.last, slab.last);
  for (int64_t x = std::max(g.first, slab.first); x <= last; x += kLanes) {
    double us[kLanes], ts[kLanes], centres_y[kLanes], centres_z[kLanes], lows[kLanes], highs[kLanes];
    const double first_x = static_cast<double>(x), mean_x = g.mean[0], mean_y = g.mean[1], mean_z = g.mean[2];
    const double a = g.a, shift_y = g.shift_y, width_y = g.half_y, shift_zx = g.shift_zx, shift_zy = g.shift_zy;
    for (int l = 0; l < kLanes; ++l) {
      const double u = (first_x + l) - mean_x, t = kEMax - a * u * u;
      const double centre = mean_y - shift_y * u, half_y = std::sqrt(t > 0.0 ? t : 0.0) * width_y + kMargin;
      const double low = std::ceil(centre - half_y), high = std::floor(centre + half_y);
      us[l] = u, ts[l] = t, centres_y[l] = centre, centres_z[l] = mean_z - shift_zx * u + shift_zy * mean_y;
      lows[l] = low > 0.0 ? (low < size_y ? low : size_y) : 0.0;
      highs[l] = high < size_y - 1.0 ? (high > -1.0 ? high : -1.0) : size_y - 1.0;
    }
    int planes[kLanes], left = 0;
    for (int l = 0; l < std::min<int64_t>(kLanes, last - x + 1); ++l) {
      planes[left] = l;
      left += lows[l] <= highs[l];
    }
    while (left > 0) {
      int longer = 0;
      for (int i = 0; i < left; ++i) {
        const int plane = planes[i];
        const double first_y = lows[plane], centre = centres_z[plane] - shift_zy * first_y;
        // Positions in z count from the voxel nearest to this centre: small numbers, which float holds well.
        const double origin = std::nearbyint(std::max(std::min(centre, size_z - 1.0), 0.0));
        const float lowest = static_cast<float>(-origin), end = static_cast<float>(size_z - origin);
        const int64_t y = static_cast<int64_t>(first_y);
        const int64_t base = ((x + plane) * sizes.y + y) * sizes.z + static_cast<int64_t>(origin);
        const Lanes v = static_cast<float>(first_y - centres_y[plane]) + index;
        const Lanes t = static_cast<float>(ts[plane]) - b * v * v;
        const Lanes centre_z = static_cast<float>(centre - origin) - down;
        Lanes start;
        if (one_run) {
          start = Smaller(Ceil(centre_z - (0.5f * kCount - static_cast<float>(kMargin))), Lanes{} + (end - kCount));
        } else {
          const Lanes half_z = Sqrt(Larger(t, Lanes{})) * g.half_z + static_cast<float>(kMargin);
          const Lanes low = Larger(Ceil(centre_z - half_z), Lanes{} + lowest);
          const Lanes high = Smaller(Floor(centre_z + half_z), Lanes{} + (end - 1.0f));
          const Lanes runs = Larger(Floor((high - low) * (1.0f / kCount) + 1.0f), Lanes{} + 1.0f);
          start = Smaller(low, end - kCount * runs);  // the last run ends inside the row, if they fit at all
          Store(__builtin_convertvector(runs, Integers), rows.runs + count);
        }
        start = Larger(start, Lanes{} + lowest);
        Store(__builtin_convertvector(__builtin_convertvector(start, Integers), Offsets) + (base + below),
              rows.voxel + count);
        Store(t, rows.t + count);
        Store((start - centre_z) * g.root_z, rows.w + count);
        Store(Lanes{} + static_cast<float>(us[plane]), rows.u + count);
        Store(v, rows.v + count);
        count += static_cast<int>(std::min<double>(kLanes, highs[plane] - first_y + 1.0));
        if (count > kRows - kLanes) {
          ForEachRun(rows, count, one_run, sizes.z, body);
          count = 0;
        }
        lows[plane] = first_y + kLanes;
        planes[longer] = plane;
        longer += lows[plane] <= highs[plane];
      }
      left = longer;
    }
  }
  ForEachRun(rows, count, one_run, sizes.z, body);
}

// 2^t for t in [0, kEMax], relative error below 3e-7: rounded by adding a large number, then a minimax polynomial.
inline Lanes Exp2(const Lanes& t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const Lanes shifted = t + kRound, f = t - (shifted - kRound), f2 = f * f;
  const Lanes low = 1.0f + 0.693147f * f, middle = 0.24022242f + 0.055507336f * f;
  const Lanes p = low + f2 * (middle + f2 * (0.009671513f + 0.0013264727f * f));
  return reinterpret_cast<Lanes>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
}

// The argument of support.py's smoothstep, for t = kEMax - e clipped to 0.
inline Lanes FadeArgument(const Lanes& t) {
  constexpr float kPerE = 1.0 / (kScale * (radgs::kQMax - radgs::kQFade));
  return Smaller(t * kPerE, Lanes{} + 1.0f);
}

// w of the voxels of a run, less w of the first voxel of the row.
inline Lanes Steps(float root_z, int64_t skipped) {
  Lanes steps;
  for (int l = 0; l < kLanes; ++l) steps[l] = root_z * static_cast<float>(skipped + l);
  return steps;
}

void Draw(const Gaussian& g, Interval slab, const Sizes& sizes, float* volume) {
  const float peak = g.density * kAtEdge, root = g.root_z;
  ForEachRun(g, slab, sizes, [=](const Rows& rows, const int32_t* list, int count, int64_t skipped, int64_t room) {
    const auto values = [factor = peak, steps = Steps(root, skipped), &rows](int32_t row) {
      const Lanes w = rows.w[row] + steps, t = Larger(rows.t[row] - w * w, Lanes{}), s = FadeArgument(t);
      return Exp2(t) * (s * s * (3.0f - 2.0f * s)) * factor;
    };
    float* const first = volume + skipped;
    if (room == kLanes) {
      for (int i = 0; i < count; ++i) {
        float* const voxels = first + rows.voxel[list[i]];
        Store(Load<Lanes>(voxels) + values(list[i]), voxels);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const Lanes added = values(list[i]);
        for (int64_t l = 0; l < room; ++l) first[rows.voxel[list[i]] + l] += added[l];
      }
    }
  });
}

// With the cotangent c: the sums of c weight, of c weight' times u, v, w, and of c weight' times their products.
void Gather(const Gaussian& g, const Sizes& sizes, const float* volume, double* total) {
  const float root = g.root_z;
  std::fill_n(total, kSums, 0.0);
  const Interval all = {g.first, g.last};
  ForEachRun(g, all, sizes, [=](const Rows& rows, const int32_t* list, int count, int64_t skipped, int64_t room) {
    constexpr float kFadeSlope = 6.0f / (radgs::kQMax - radgs::kQFade);
    const Lanes steps = Steps(root, skipped);
    const float* const first = volume + skipped;
    // Two loops, so that the sums stay in registers.
    float slopes[kRows * kLanes];
    Lanes sums[kSums] = {};
    for (int i = 0; i < count; ++i) {
      const int32_t row = list[i];
      const float* cotangent = first + rows.voxel[row];
      float border[kLanes] = {};
      if (room < kLanes) {
        std::copy(cotangent, cotangent + room, border);
        cotangent = border;
      }
      const Lanes w = rows.w[row] + steps, t = Larger(rows.t[row] - w * w, Lanes{}), s = FadeArgument(t);
      const Lanes value = Load<Lanes>(cotangent) * Exp2(t), fade = s * s * (3.0f - 2.0f * s);
      sums[0] += value * fade;
      Store(value * (s * (s - 1.0f) * kFadeSlope - 0.5f * fade), slopes + i * kLanes);
    }
    for (int i = 0; i < count; ++i) {
      const int32_t row = list[i];
      const float u = rows.u[row], v = rows.v[row];
      const Lanes w = rows.w[row] + steps, slope = Load<Lanes>(slopes + i * kLanes);
      const Lanes by_u = slope * u, by_v = slope * v, by_w = slope * w;
      sums[1] += by_u;
      sums[2] += by_v;
      sums[3] += by_w;
      sums[4] += by_u * u;
      sums[5] += by_u * v;
      sums[6] += by_u * w;
      sums[7] += by_v * v;
      sums[8] += by_v * w;
      sums[9] += by_w * w;
    }
    for (int i = 0; i < kSums; ++i) {
      for (int l = 0; l < kLanes; ++l) total[i] += static_cast<double>(kAtEdge) * sums[i][l];
    }
  });
}

// Gradients from the sums; r = (u, v - shift_y u, w / root_z - across u - shift_zy v), K r is the gradient of q / 2.
void ToGradients(const Gaussian& g, const double* sums, float* to_density, float* to_mean, float* to_precision) {
  const double root = g.root_z, shift = g.shift_y, down = g.shift_zy, across = g.shift_zx - down * shift;
  const double u = g.a * sums[1], v = g.b * sums[2], w = root * sums[3], turn = -2.0 * g.density / kScale;
  const double uu = sums[4], uv = sums[5], uz = sums[6] / root, vv = sums[7], vz = sums[8] / root;
  const double zz = sums[9] / (root * root), xy = uv - shift * uu, xz = uz - across * uu - down * uv;
  const double vr = vz - across * uv - down * vv;  // of v and the third offset
  *to_density = static_cast<float>(sums[0]);
  to_mean[0] = static_cast<float>(turn * (u + shift * v + g.shift_zx * w));
  to_mean[1] = static_cast<float>(turn * (v + down * w));
  to_mean[2] = static_cast<float>(turn * w);
  to_precision[0] = static_cast<float>(g.density * uu);
  to_precision[1] = static_cast<float>(2.0 * g.density * xy);  // an off-diagonal entry is two of the matrix
  to_precision[2] = static_cast<float>(2.0 * g.density * xz);
  to_precision[3] = static_cast<float>(g.density * (vv - shift * (uv + xy)));
  to_precision[4] = static_cast<float>(2.0 * g.density * (vr - shift * xz));
  to_precision[5] = static_cast<float>(g.density * (zz - across * (uz + xz) - down * (vz + vr)));
}

// The Gaussians of one volume in the order of the planes of their means (stable), so that those drawn one after another
// share voxels in the cache.
void SortByPlane(const float* mean, int64_t n, int64_t size, int64_t* order) {
  std::vector<int64_t> starts(size + 1, 0);
  const auto plane = [=](int64_t i) {
    const float x = mean[3 * i], last = static_cast<float>(size - 1);
    return static_cast<int64_t>(x > 0.0f ? (x < last ? x : last) : 0.0f);
  };
  for (int64_t i = 0; i < n; ++i) ++starts[plane(i) + 1];
  for (int64_t x = 0; x < size; ++x) starts[x + 1] += starts[x];
  for (int64_t i = 0; i < n; ++i) order[starts[plane(i)]++] = i;
}

// Prefetches a Gaussian that is needed soon; in sorted order the processor cannot predict it.
constexpr int64_t kAhead = 8;
inline void Fetch(const float* mean, const float* precision, int64_t i) {
  __builtin_prefetch(mean + 3 * i);
  __builtin_prefetch(precision + 6 * i);
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                   ffi::Buffer<ffi::F32> precision, ffi::ResultBuffer<ffi::F32> output) {
  const int64_t total = density.element_count();
  float* out = output->typed_data();
  std::fill_n(out, output->element_count(), 0.0f);
  if (total == 0 || output->element_count() == 0) return ffi::Error::Success();
  const auto dimensions = output->dimensions().last(3);
  const Sizes sizes = {dimensions[0], dimensions[1], dimensions[2]};
  const int64_t size = sizes.x * sizes.y * sizes.z, n = density.dimensions().back(), volumes = total / n;
  const float *rho = density.typed_data(), *m = mean.typed_data(), *K = precision.typed_data();

  // Number of volumes processed at once, limited to bound the memory of their prepared Gaussians.
  constexpr int64_t kPrepared = 1 << 18, kGrain = 256;
  const int64_t group = std::clamp<int64_t>(kPrepared / n, 1, volumes), blocks = (n + kGrain - 1) / kGrain;
  const int64_t slabs = pool.num_threads() > 1 ? radgs::SlabsPerImage(pool, group, sizes.x) : 1;
  const std::unique_ptr<int64_t[]> order(new (std::nothrow) int64_t[group * n]);
  const std::unique_ptr<Gaussian[]> gaussians(new (std::nothrow) Gaussian[group * n]);
  const std::unique_ptr<Interval[]> reach(new (std::nothrow) Interval[group * blocks]);
  if (!order || !gaussians || !reach) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "voxelize: no memory");
  for (int64_t begin = 0; begin < volumes; begin += group) {
    const int64_t count = std::min(group, volumes - begin);
    radgs::ParallelFor(pool, count, [&](int64_t k) {
      SortByPlane(m + 3 * (begin + k) * n, n, sizes.x, &order[k * n]);
    });
    radgs::ParallelFor(pool, count * blocks, [&](int64_t task) {
      const int64_t k = task / blocks, first = (task % blocks) * kGrain;
      Interval all = {sizes.x, -1};
      for (int64_t i = first; i < std::min(n, first + kGrain); ++i) {
        const int64_t from = (begin + k) * n + order[k * n + i];
        if (i + kAhead < n) Fetch(m, K, (begin + k) * n + order[k * n + i + kAhead]);
        Gaussian& g = gaussians[k * n + i];
        Prepare(rho[from], m + 3 * from, K + 6 * from, sizes, g);
        if (g.first <= g.last) {
          all = {std::min(all.first, g.first), std::max(all.last, g.last)};
        }
      }
      reach[task] = all;
    });
    radgs::ParallelFor(pool, count * slabs, [&](int64_t task) {
      const int64_t k = task / slabs, part = task % slabs;
      const Interval slab = {part * sizes.x / slabs, (part + 1) * sizes.x / slabs - 1};
      for (int64_t block = 0; block < blocks; ++block) {
        const Interval all = reach[k * blocks + block];
        if (all.last < slab.first || all.first > slab.last) continue;
        for (int64_t i = block * kGrain; i < std::min(n, (block + 1) * kGrain); ++i) {
          Draw(gaussians[k * n + i], slab, sizes, out + (begin + k) * size);
        }
      }
    });
  }
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                    ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> cotangent,
                    ffi::ResultBuffer<ffi::F32> to_density, ffi::ResultBuffer<ffi::F32> to_mean,
                    ffi::ResultBuffer<ffi::F32> to_precision) {
  const int64_t total = density.element_count(), n = density.dimensions().back();
  if (total == 0) return ffi::Error::Success();
  const auto dimensions = cotangent.dimensions().last(3);
  const Sizes sizes = {dimensions[0], dimensions[1], dimensions[2]};
  const int64_t size = sizes.x * sizes.y * sizes.z, volumes = total / n;
  const float *rho = density.typed_data(), *m = mean.typed_data(), *K = precision.typed_data();
  const float* c = cotangent.typed_data();
  float *drho = to_density->typed_data(), *dm = to_mean->typed_data(), *dK = to_precision->typed_data();
  if (size == 0) {
    std::fill_n(drho, total, 0.0f);
    std::fill_n(dm, 3 * total, 0.0f);
    std::fill_n(dK, 6 * total, 0.0f);
    return ffi::Error::Success();
  }
  const std::unique_ptr<int64_t[]> order(new (std::nothrow) int64_t[total]);
  if (!order) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "voxelize: no memory");
  radgs::ParallelFor(pool, volumes, [&](int64_t k) { SortByPlane(m + 3 * k * n, n, sizes.x, &order[k * n]); });
  constexpr int64_t kGrain = 32;
  radgs::ParallelFor(pool, (total + kGrain - 1) / kGrain, [&](int64_t block) {
    for (int64_t at = block * kGrain; at < std::min(total, (block + 1) * kGrain); ++at) {
      const int64_t volume = at / n, i = volume * n + order[at];
      if (at + kAhead < total) Fetch(m, K, (at + kAhead) / n * n + order[at + kAhead]);
      Gaussian g;
      Prepare(rho[i], m + 3 * i, K + 6 * i, sizes, g);
      if (g.last < g.first) {
        drho[i] = 0.0f;
        std::fill_n(dm + 3 * i, 3, 0.0f);
        std::fill_n(dK + 6 * i, 6, 0.0f);
        continue;
      }
      double sums[kSums];
      Gather(g, sizes, c + volume * size, sums);
      ToGradients(g, sums, drho + i, dm + 3 * i, dK + 6 * i);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsVoxelizeForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsVoxelizeBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
