// Forward `drr` on the CPU: trilinear ray marching in registers, rays split over XLA's own threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// One ray in voxel indices: origin o, direction d per mm, samples (i + 1/2) * step for i in [first, first + count).
float March(const float* volume, const int64_t* n, const float* o, const float* d, double step, int64_t first,
            int64_t count) {
  double sum = 0.0;
  for (int64_t i = first; i < first + count; ++i) {
    const float t = static_cast<float>((static_cast<double>(i) + 0.5) * step);
    const float x = o[0] + t * d[0], y = o[1] + t * d[1], z = o[2] + t * d[2];
    const float bx = std::floor(x), by = std::floor(y), bz = std::floor(z);
    const int64_t ix = static_cast<int64_t>(bx), iy = static_cast<int64_t>(by), iz = static_cast<int64_t>(bz);
    const float fx = x - bx, fy = y - by, fz = z - bz;
    if (ix >= 0 && iy >= 0 && iz >= 0 && ix + 1 < n[0] && iy + 1 < n[1] && iz + 1 < n[2]) {
      const float* p = volume + (ix * n[1] + iy) * n[2] + iz;
      const float* q = p + n[1] * n[2];
      const float a = p[0] + fz * (p[1] - p[0]), b = p[n[2]] + fz * (p[n[2] + 1] - p[n[2]]);
      const float c = q[0] + fz * (q[1] - q[0]), e = q[n[2]] + fz * (q[n[2] + 1] - q[n[2]]);
      const float front = a + fy * (b - a), back = c + fy * (e - c);
      sum += front + fx * (back - front);
      continue;
    }
    for (int corner = 0; corner < 8; ++corner) {
      const int64_t cx = ix + (corner >> 2), cy = iy + ((corner >> 1) & 1), cz = iz + (corner & 1);
      if (cx < 0 || cy < 0 || cz < 0 || cx >= n[0] || cy >= n[1] || cz >= n[2]) continue;
      sum += (corner & 4 ? fx : 1 - fx) * (corner & 2 ? fy : 1 - fy) * (corner & 1 ? fz : 1 - fz) *
             volume[(cx * n[1] + cy) * n[2] + cz];
    }
  }
  return static_cast<float>(sum * step);
}

struct Range {
  int64_t first = 0, count = 0;
};

// Lattice indices inside the box (-1, n), where the volume's trilinear support ends.
Range SampleRange(const int64_t* n, const float* o, const float* d, double step) {
  double near = 0.0, far = 1e30;
  for (int axis = 0; axis < 3; ++axis) {
    const double slope = std::abs(d[axis]) < 1e-12 ? std::copysign(1e-12, static_cast<double>(d[axis])) : d[axis];
    const double a = (-1.0 - o[axis]) / slope, b = (static_cast<double>(n[axis]) - o[axis]) / slope;
    near = std::max(near, std::min(a, b));
    far = std::min(far, std::max(a, b));
  }
  if (!(far > near) || !(far < 1e8)) return {};
  const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(std::floor(near / step - 0.5)));
  const int64_t last = static_cast<int64_t>(std::ceil(far / step - 0.5));
  return {first, std::max<int64_t>(0, last - first + 1)};
}

ffi::Error Drr(ffi::ThreadPool pool, float step, ffi::Buffer<ffi::F32> volume, ffi::Buffer<ffi::F32> origin,
               ffi::Buffer<ffi::F32> direction, ffi::ResultBuffer<ffi::F32> image) {
  const auto size = volume.dimensions();
  const int64_t n[3] = {size[0], size[1], size[2]};
  const int64_t views = origin.dimensions()[0];
  const int64_t total = static_cast<int64_t>(image->element_count());
  if (total == 0) return ffi::Error::Success();
  const int64_t rays = total / views, grain = 256;
  const float *density = volume.typed_data(), *o = origin.typed_data(), *d = direction.typed_data();
  float* out = image->typed_data();
  radgs::ParallelFor(pool, (total + grain - 1) / grain, [&](int64_t block) {
    for (int64_t i = block * grain; i < std::min(total, (block + 1) * grain); ++i) {
      const Range range = SampleRange(n, o + 3 * (i / rays), d + 3 * i, step);
      out[i] = March(density, n, o + 3 * (i / rays), d + 3 * i, step, range.first, range.count);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsDrr, Drr,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("step_mm")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
