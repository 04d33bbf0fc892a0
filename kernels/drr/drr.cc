// `drr` and its gradients on the CPU: rays march through vector registers, work split over XLA's own threads.
//
// Rounding keeps the positions along a ray in order, so the samples inside a box are one range of lattice indices, and
// a check of its two ends checks all of them. That leaves long runs of samples that need no checks of their own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using radgs::kLanes;

constexpr int64_t kRun = 64;   // samples processed at a time
constexpr int64_t kTile = 16;  // side of a tile, px

// Two neighbours along z, at any alignment.
typedef float Pair __attribute__((vector_size(8), aligned(4), may_alias));

// An array in row-major order.
struct Shape {
  int64_t x, y, z;

  explicit Shape(ffi::Span<const int64_t> sizes) : Shape(sizes[0], sizes[1], sizes[2]) {}
  Shape(int64_t x, int64_t y, int64_t z) : x(x), y(y), z(z) {}
  int64_t Count() const { return x * y * z; }
};

// Lattice indices [first, last).
struct Range {
  int64_t first = 0, last = 0;
};

// A ray in voxel indices: origin o, direction d per mm, samples at distances (i + 1/2) * step.
struct Ray {
  const float *o, *d;
  double step;

  float Position(int axis, int64_t i) const {
    return o[axis] + static_cast<float>((static_cast<double>(i) + 0.5) * step) * d[axis];
  }
};

// Positions p with low <= p < high on the first `axes` axes.
struct Box {
  int axes;
  float low[3], high[3];

  bool Holds(const Ray& ray, int64_t i) const {
    bool inside = true;
    for (int axis = 0; axis < axes; ++axis) {
      const float p = ray.Position(axis, i);
      inside &= (p >= low[axis]) & (p < high[axis]);
    }
    return inside;
  }

  // Those samples of `range` that are inside, on a finite ray.
  Range Inside(const Ray& ray, Range range) const {
    double near = static_cast<double>(range.first), far = static_cast<double>(range.last);
    for (int axis = 0; axis < axes; ++axis) {
      const double slope = std::copysign(std::max(std::abs(static_cast<double>(ray.d[axis])), 1e-12), ray.d[axis]);
      const double inverse = 1.0 / (slope * ray.step);
      const double a = (static_cast<double>(low[axis]) - ray.o[axis]) * inverse - 0.5;
      const double b = (static_cast<double>(high[axis]) - ray.o[axis]) * inverse - 0.5;
      near = std::max(near, std::min(a, b));
      far = std::min(far, std::max(a, b));
    }
    if (!(near < far)) return {};
    range = {static_cast<int64_t>(near), std::min(static_cast<int64_t>(far) + 2, range.last)};
    while (range.first < range.last && !Holds(ray, range.first)) ++range.first;
    while (range.first < range.last && !Holds(ray, range.last - 1)) --range.last;
    return range;
  }
};

// Whether all `count` voxels have the bits of +0, which a compiler tests many at a time.
bool AreZero(const float* voxels, int64_t count) {
  constexpr int64_t kChunk = 64;
  for (int64_t i = 0; i < count; i += kChunk) {
    uint32_t bits[kChunk] = {}, any = 0;
    std::memcpy(bits, voxels + i, sizeof(float) * std::min(kChunk, count - i));
    for (const uint32_t b : bits) any |= b;
    if (any) return false;
  }
  return true;
}

// The first voxels along each axis beyond which all are exactly 0, such as those that only pad a shape. Every row has an end, so
// that looking along z is slow: where the middle plane is nearly full, all of z is taken for occupied.
Shape Occupied(const float* volume, const Shape& n) {
  const int64_t row = n.z, plane = n.y * n.z;
  Shape full(n.x, 0, 0);
  while (full.x > 0 && AreZero(volume + (full.x - 1) * plane, plane)) --full.x;
  // From the middle outwards: what is found there leaves little to look through elsewhere.
  const auto middle_out = [](int64_t i, int64_t count) { return (count - 1) / 2 + (i % 2 ? (i + 1) / 2 : -i / 2); };
  for (int64_t i = 0; i < full.x && full.y < n.y; ++i) {
    const float* const of_x = volume + middle_out(i, full.x) * plane;
    if (AreZero(of_x + full.y * row, (n.y - full.y) * row)) continue;
    int64_t last = n.y;
    while (AreZero(of_x + (last - 1) * row, row)) --last;
    full.y = last;
  }
  for (int64_t i = 0; i < full.x && full.z < n.z; ++i) {
    for (int64_t j = 0; j < full.y && full.z < n.z; ++j) {
      const float* const of_xy = volume + middle_out(i, full.x) * plane + middle_out(j, full.y) * row;
      if (AreZero(of_xy + full.z, n.z - full.z)) continue;
      int64_t last = n.z;
      while (AreZero(of_xy + last - 1, 1)) --last;
      full.z = last;
    }
    if (8 * full.z > 7 * n.z) full.z = n.z;
  }
  return full;
}

// The samples where interpolation finds any voxel; none if the ray is not finite or does not leave within 1e8 mm.
Range Support(const Ray& ray, const Shape& n) {
  double sum = 0.0;
  for (int axis = 0; axis < 3; ++axis) sum += static_cast<double>(ray.o[axis]) + ray.d[axis];
  if (!std::isfinite(sum) || !(ray.step > 0.0)) return {};
  const int64_t limit = static_cast<int64_t>(std::min(1e8 / ray.step, 1e18));
  const Box box = {
      3, {-1.0f, -1.0f, -1.0f}, {static_cast<float>(n.x), static_cast<float>(n.y), static_cast<float>(n.z)}};
  const Range range = box.Inside(ray, {0, limit});
  return range.last < limit ? range : Range{};
}

// Those of them where it finds eight.
Range Interior(const Ray& ray, const Shape& n, Range support) {
  const Box box = {3,
                   {0.0f, 0.0f, 0.0f},
                   {static_cast<float>(n.x - 1), static_cast<float>(n.y - 1), static_cast<float>(n.z - 1)}};
  const Range range = box.Inside(ray, support);
  return range.first < range.last ? range : Range{support.last, support.last};
}

// Up to kRun samples: the lowest corner of the cell of each as an offset into an array, the place in the cell and the
// distance along the ray.
struct Samples {
  int32_t corner[kRun + kLanes];
  float x[kRun + kLanes], y[kRun + kLanes], z[kRun + kLanes], t[kRun + kLanes];
};

// Writes samples [first, first + count) of a ray to the entries from `at` on, and the last of them to up to kLanes - 1
// entries more. In the array, of shape `n`, voxel (0, 0, 0) has the offset `zero`; offsets of samples elsewhere are
// clipped.
void Locate(const Ray& ray, const Shape& n, int64_t zero, int64_t first, int64_t count, int64_t at, Samples& samples) {
  const float ox = ray.o[0], oy = ray.o[1], oz = ray.o[2], dx = ray.d[0], dy = ray.d[1], dz = ray.d[2];
  const double start = static_cast<double>(first) + 0.5, step = ray.step;
  const int32_t row = static_cast<int32_t>(n.z), plane = static_cast<int32_t>(n.y * n.z);
  const int32_t base = static_cast<int32_t>(zero), top = static_cast<int32_t>(n.Count()) - plane - row - 2;
  const int32_t last = static_cast<int32_t>(count) - 1;
  for (int32_t begin = 0; begin <= last; begin += kLanes) {
    const int64_t to = at + begin;
    for (int32_t l = 0; l < kLanes; ++l) {
      const float t = static_cast<float>((start + std::min(begin + l, last)) * step);
      const float x = ox + t * dx, y = oy + t * dy, z = oz + t * dz;
      const float bx = std::floor(x), by = std::floor(y), bz = std::floor(z);
      const int32_t ix = static_cast<int32_t>(bx), iy = static_cast<int32_t>(by), iz = static_cast<int32_t>(bz);
      samples.corner[to + l] = std::clamp(base + ix * plane + iy * row + iz, 0, top);
      samples.x[to + l] = x - bx;
      samples.y[to + l] = y - by;
      samples.z[to + l] = z - bz;
      samples.t[to + l] = t;
    }
  }
}

// The eight voxels around each sample as four pairs along z: pairs[1] is one row further, pairs[2] one plane.
struct Corners {
  float pairs[4][2 * kRun];

  void Load(const float* volume, const Shape& n, const Samples& samples, int64_t first, int64_t last) {
    const int64_t row = n.z, plane = n.y * n.z;
    for (int64_t l = first; l < last; ++l) {
      const float* p = volume + samples.corner[l];
      std::memcpy(pairs[0] + 2 * l, p, sizeof(Pair));
      std::memcpy(pairs[1] + 2 * l, p + row, sizeof(Pair));
      std::memcpy(pairs[2] + 2 * l, p + plane, sizeof(Pair));
      std::memcpy(pairs[3] + 2 * l, p + plane + row, sizeof(Pair));
    }
  }

  // For samples anywhere in the support of the volume; voxels that do not exist are 0.
  void LoadChecked(const float* volume, const Shape& n, const Ray& ray, const Samples& samples, int64_t first,
                   int64_t last) {
    for (int64_t l = first; l < last; ++l) {
      const float t = samples.t[l];
      const int64_t x = static_cast<int64_t>(std::floor(ray.o[0] + t * ray.d[0]));
      const int64_t y = static_cast<int64_t>(std::floor(ray.o[1] + t * ray.d[1]));
      const int64_t z = static_cast<int64_t>(std::floor(ray.o[2] + t * ray.d[2]));
      const bool low = z >= 0, high = z + 1 < n.z;
      for (int k = 0; k < 4; ++k) {
        const int64_t cx = x + (k >> 1), cy = y + (k & 1), corner = (cx * n.y + cy) * n.z + z;
        const bool row = (cx >= 0) & (cy >= 0) & (cx < n.x) & (cy < n.y);
        pairs[k][2 * l] = row && low ? volume[corner] : 0.0f;
        pairs[k][2 * l + 1] = row && high ? volume[corner + 1] : 0.0f;
      }
    }
  }
};

// Calls body(samples, corners, count, begin, end) until every sample of a ray in a volume was an entry, but for some that
// meet no `occupied` voxel; entries [begin, end) of the `count` are in the interior. Behind them, up to a full vector of
// lanes, corners are 0.
template <typename Body>
void ForEachRun(const float* volume, const Shape& n, const Shape& occupied, const Ray& ray, const Body& body) {
  const Range support = Support(ray, occupied), interior = Interior(ray, n, support);
  Samples samples;
  Corners corners;
  for (int64_t i = support.first; i < support.last; i += kRun) {
    const int64_t count = std::min(kRun, support.last - i);
    const int64_t begin = std::clamp<int64_t>(interior.first - i, 0, count);
    const int64_t end = std::clamp<int64_t>(interior.last - i, 0, count);
    Locate(ray, n, 0, i, count, 0, samples);
    corners.LoadChecked(volume, n, ray, samples, 0, begin);
    corners.Load(volume, n, samples, begin, end);
    corners.LoadChecked(volume, n, ray, samples, end, count);
    const int64_t full = (count + kLanes - 1) / kLanes * kLanes;
    for (auto& pairs : corners.pairs) std::fill(pairs + 2 * count, pairs + 2 * full, 0.0f);
    body(samples, corners, count, begin, end);
  }
}

double SumValues(const float* volume, const Shape& n, const Shape& occupied, const Ray& ray) {
  double sum = 0.0;
  const auto add = [&](const Samples& s, const Corners& corners, int64_t count, int64_t begin, int64_t end) {
    const auto add_corners = [&](int64_t first, int64_t last) {
      for (int64_t l = first; l < last; ++l) {
        const float wx[2] = {1 - s.x[l], s.x[l]}, wy[2] = {1 - s.y[l], s.y[l]}, wz[2] = {1 - s.z[l], s.z[l]};
        for (int k = 0; k < 8; ++k) {
          sum += wx[k >> 2] * wy[(k >> 1) & 1] * wz[k & 1] * corners.pairs[k >> 1][2 * l + (k & 1)];
        }
      }
    };
    double values[kRun];
    for (int64_t from = 0; from < count; from += kLanes) {
      for (int64_t l = from; l < from + kLanes; ++l) {
        const auto along_z = [&](const float* pairs) {
          return pairs[2 * l] + s.z[l] * (pairs[2 * l + 1] - pairs[2 * l]);
        };
        const float a = along_z(corners.pairs[0]), b = along_z(corners.pairs[1]);
        const float c = along_z(corners.pairs[2]), e = along_z(corners.pairs[3]);
        const float front = a + s.y[l] * (b - a), back = c + s.y[l] * (e - c);
        values[l] = front + s.x[l] * (back - front);
      }
    }
    add_corners(0, begin);
    for (int64_t l = begin; l < end; ++l) sum += values[l];
    add_corners(end, count);
  };
  ForEachRun(volume, n, occupied, ray, add);
  return sum;
}

// Sums over the samples of the volume, of its slopes, per voxel, and of their products with the distance.
struct Slopes {
  double value = 0.0, by_origin[3] = {}, by_direction[3] = {};
};

Slopes SumSlopes(const float* volume, const Shape& n, const Shape& occupied, const Ray& ray) {
  float sums[7][kLanes] = {};
  ForEachRun(volume, n, occupied, ray, [&](const Samples& s, const Corners& corners, int64_t count, int64_t, int64_t) {
    for (int64_t from = 0; from < count; from += kLanes) {
      const float* pairs[4];
      for (int k = 0; k < 4; ++k) pairs[k] = corners.pairs[k] + 2 * from;
      for (int l = 0; l < kLanes; ++l) {
        const float x = s.x[from + l], y = s.y[from + l], z = s.z[from + l], t = s.t[from + l];
        const float za = pairs[0][2 * l + 1] - pairs[0][2 * l], zb = pairs[1][2 * l + 1] - pairs[1][2 * l];
        const float zc = pairs[2][2 * l + 1] - pairs[2][2 * l], ze = pairs[3][2 * l + 1] - pairs[3][2 * l];
        const float a = pairs[0][2 * l] + z * za, b = pairs[1][2 * l] + z * zb;
        const float c = pairs[2][2 * l] + z * zc, e = pairs[3][2 * l] + z * ze;
        const float front = b - a, back = e - c, left = a + y * front, slope_x = (c + y * back) - left;
        const float slope_y = front + x * (back - front);
        const float front_z = za + y * (zb - za), back_z = zc + y * (ze - zc);
        const float slope_z = front_z + x * (back_z - front_z);
        sums[0][l] += slope_x;
        sums[1][l] += slope_y;
        sums[2][l] += slope_z;
        sums[3][l] += t * slope_x;
        sums[4][l] += t * slope_y;
        sums[5][l] += t * slope_z;
        sums[6][l] += left + x * slope_x;
      }
    }
  });
  Slopes total;
  for (int axis = 0; axis < 3; ++axis) {
    for (int l = 0; l < kLanes; ++l) {
      total.by_origin[axis] += sums[axis][l];
      total.by_direction[axis] += sums[3 + axis][l];
    }
  }
  for (int l = 0; l < kLanes; ++l) total.value += sums[6][l];
  return total;
}

// Adds weights[l], spread over the eight corners of its cell, to an array of shape `n`; for the first `count` entries.
void Scatter(const Samples& samples, const float* weights, int64_t count, const Shape& n, float* array) {
  float across[4][kRun], along_z[2 * kRun];
  for (int64_t l = 0; l < kRun; ++l) {
    const float back = weights[l] * samples.x[l], front = weights[l] - back;
    across[1][l] = front * samples.y[l];
    across[0][l] = front - across[1][l];
    across[3][l] = back * samples.y[l];
    across[2][l] = back - across[3][l];
  }
  for (int64_t l = 0; l < kRun; ++l) {
    along_z[2 * l] = 1.0f - samples.z[l];
    along_z[2 * l + 1] = samples.z[l];
  }
  const int64_t row = n.z, plane = n.y * n.z, offsets[4] = {0, row, plane, plane + row};
  for (int64_t l = 0; l < count; ++l) {
    float* const corner = array + samples.corner[l];
    const Pair z = *reinterpret_cast<const Pair*>(along_z + 2 * l);
    for (int k = 0; k < 4; ++k) *reinterpret_cast<Pair*>(corner + offsets[k]) += across[k][l] * z;
  }
}

// Images in tiles, because the rays of a tile meet the same voxels.
struct Tiles {
  int64_t views, height, width, down, across;

  explicit Tiles(ffi::Span<const int64_t> sizes) : views(sizes[0]), height(sizes[1]), width(sizes[2]) {
    down = (height + kTile - 1) / kTile;
    across = (width + kTile - 1) / kTile;
  }

  int64_t Count() const { return views * down * across; }
  int64_t View(int64_t tile) const { return tile / (down * across); }

  template <typename Body>
  void ForEachPixel(int64_t tile, const Body& body) const {
    const int64_t top = tile / across % down * kTile, left = tile % across * kTile, image = View(tile) * height;
    for (int64_t v = top; v < std::min(top + kTile, height); ++v) {
      for (int64_t u = left; u < std::min(left + kTile, width); ++u) body((image + v) * width + u);
    }
  }
};

ffi::Error Forward(ffi::ThreadPool pool, float step, ffi::Buffer<ffi::F32> volume, ffi::Buffer<ffi::F32> origin,
                   ffi::Buffer<ffi::F32> direction, ffi::ResultBuffer<ffi::F32> image) {
  const Shape n(volume.dimensions());
  const Tiles tiles(image->dimensions());
  const float *density = volume.typed_data(), *o = origin.typed_data(), *d = direction.typed_data();
  float* out = image->typed_data();
  std::fill_n(out, image->element_count(), 0.0f);
  if (n.Count() == 0) return ffi::Error::Success();
  const Shape occupied = Occupied(density, n);
  radgs::ParallelFor(pool, tiles.Count(), [&](int64_t tile) {
    tiles.ForEachPixel(tile, [&](int64_t pixel) {
      const Ray ray = {o + 3 * tiles.View(tile), d + 3 * pixel, step};
      out[pixel] = static_cast<float>(SumValues(density, n, occupied, ray) * ray.step);
    });
  });
  return ffi::Error::Success();
}

ffi::Error PerRay(ffi::ThreadPool pool, float step, ffi::Buffer<ffi::F32> volume, ffi::Buffer<ffi::F32> origin,
                  ffi::Buffer<ffi::F32> direction, ffi::ResultBuffer<ffi::F32> image,
                  ffi::ResultBuffer<ffi::F32> by_origin, ffi::ResultBuffer<ffi::F32> by_direction) {
  const Shape n(volume.dimensions());
  const Tiles tiles(image->dimensions());
  const float *density = volume.typed_data(), *o = origin.typed_data(), *d = direction.typed_data();
  float *out = image->typed_data(), *d_o = by_origin->typed_data(), *d_d = by_direction->typed_data();
  std::fill_n(out, image->element_count(), 0.0f);
  std::fill_n(d_o, by_origin->element_count(), 0.0f);
  std::fill_n(d_d, by_direction->element_count(), 0.0f);
  if (n.Count() == 0) return ffi::Error::Success();
  const Shape occupied = Occupied(density, n);
  radgs::ParallelFor(pool, tiles.Count(), [&](int64_t tile) {
    tiles.ForEachPixel(tile, [&](int64_t pixel) {
      const Ray ray = {o + 3 * tiles.View(tile), d + 3 * pixel, step};
      const Slopes slopes = SumSlopes(density, n, occupied, ray);
      out[pixel] = static_cast<float>(slopes.value * ray.step);
      for (int axis = 0; axis < 3; ++axis) {
        d_o[3 * pixel + axis] = static_cast<float>(slopes.by_origin[axis] * ray.step);
        d_d[3 * pixel + axis] = static_cast<float>(slopes.by_direction[axis] * ray.step);
      }
    });
  });
  return ffi::Error::Success();
}

// Every slab of voxels is one thread's, which walks all rays in order: a voxel's sum does not depend on the slabs.
ffi::Error Volume(ffi::ThreadPool pool, float step, ffi::Buffer<ffi::F32> origin, ffi::Buffer<ffi::F32> direction,
                  ffi::Buffer<ffi::F32> cotangent, ffi::ResultBuffer<ffi::F32> to_volume) {
  const Shape n(to_volume->dimensions());
  const Tiles tiles(cotangent.dimensions());
  const float *o = origin.typed_data(), *d = direction.typed_data(), *c = cotangent.typed_data();
  float* out = to_volume->typed_data();
  if (n.Count() == 0) return ffi::Error::Success();
  const ffi::Error no_memory(ffi::ErrorCode::kResourceExhausted, "drr: no memory for the gradient to the volume");
  const auto ray = [&](int64_t tile, int64_t pixel) -> Ray { return {o + 3 * tiles.View(tile), d + 3 * pixel, step}; };

  const std::unique_ptr<Range[]> supports(new (std::nothrow) Range[cotangent.element_count()]);
  if (!supports) return no_memory;
  radgs::ParallelFor(pool, tiles.Count(), [&](int64_t tile) {
    tiles.ForEachPixel(tile, [&](int64_t pixel) {
      if (c[pixel] != 0.0f) supports[pixel] = Support(ray(tile, pixel), n);
    });
  });
  const int64_t slabs = radgs::SlabsPerImage(pool, 1, n.x);
  std::atomic<bool> failed{false};
  radgs::ParallelFor(pool, slabs, [&](int64_t slab) {
    const int64_t first = slab * n.x / slabs, last = (slab + 1) * n.x / slabs;
    // One voxel more on every side, so that no sample needs a check.
    const Shape padded(last - first + 2, n.y + 2, n.z + 2);
    const std::unique_ptr<float[]> array(new (std::nothrow) float[padded.Count()]());
    if (!array) {
      failed = true;
      return;
    }
    const int64_t row = padded.z, plane = padded.y * padded.z, zero = (1 - first) * plane + row + 1;
    const Box box = {1, {static_cast<float>(first - 1)}, {static_cast<float>(last)}};
    Samples samples = {};
    float weights[kRun + kLanes] = {};
    int64_t entries = 0;
    for (int64_t tile = 0; tile < tiles.Count(); ++tile) {
      tiles.ForEachPixel(tile, [&](int64_t pixel) {
        if (supports[pixel].first == supports[pixel].last) return;
        const Range range = box.Inside(ray(tile, pixel), supports[pixel]);
        for (int64_t i = range.first; i < range.last;) {
          const int64_t count = std::min(kRun - entries, range.last - i);
          Locate(ray(tile, pixel), padded, zero, i, count, entries, samples);
          for (int64_t l = 0; l < count; l += kLanes) std::fill_n(weights + entries + l, kLanes, c[pixel] * step);
          i += count;
          entries += count;
          if (entries == kRun) {
            Scatter(samples, weights, entries, padded, array.get());
            entries = 0;
          }
        }
      });
    }
    Scatter(samples, weights, entries, padded, array.get());
    for (int64_t x = first; x < last; ++x) {
      for (int64_t y = 0; y < n.y; ++y) {
        const float* const from = array.get() + (zero + x * plane + y * row);
        std::copy(from, from + n.z, out + (x * n.y + y) * n.z);
      }
    }
  });
  return failed ? no_memory : ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsDrr, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("step_mm")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsDrrPerRay, PerRay,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("step_mm")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsDrrVolume, Volume,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("step_mm")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
