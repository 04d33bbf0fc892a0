// `voxelize` and its gradient on the CPU: rows of voxels in vector registers, work split over XLA's own threads.
//
// The quadratic form is completed to squares, axis by axis:
//   q = a (x - mx)^2 + b (y - centre of y, given x)^2 + k_zz (z - centre of z, given x and y)^2,
// which gives the exact range of every axis inside q < 16, and a row of voxels on which q is one fused multiply-add.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using radgs::Clip;
using radgs::Interval;
using radgs::kLanes;

constexpr int kSums = 10;

struct Gaussian {
  Interval planes;                     // first axis; empty for a Gaussian that is not drawn
  double mean[3];
  double a, b, shift_y, half_y;        // y is centred on m_y - shift_y dx, half-width half_y sqrt(16 - q so far)
  double shift_zx, shift_zy, half_z;   // z is centred on m_z - shift_zx dx - shift_zy dy
  float k_zz;
};

Gaussian Prepare(const float* mean, const float* precision, int64_t planes) {
  Gaussian g = {};
  if (!radgs::AllFinite(mean, 3) || !radgs::AllFinite(precision, 6)) return g;
  const double xx = precision[0], xy = precision[1], xz = precision[2], yy = precision[3], yz = precision[4];
  const double zz = precision[5];
  g.shift_zx = xz / zz, g.shift_zy = yz / zz;
  g.b = yy - yz * g.shift_zy;
  g.shift_y = (xy - yz * g.shift_zx) / g.b;
  g.a = xx - xz * g.shift_zx - g.b * g.shift_y * g.shift_y;
  if (!(zz > 0.0 && g.b > 0.0 && g.a > 0.0)) return g;
  std::copy(mean, mean + 3, g.mean);
  g.half_y = 1.0 / std::sqrt(g.b), g.half_z = 1.0 / std::sqrt(zz);
  g.k_zz = precision[5];
  const double half_x = std::sqrt(radgs::kQMax / g.a);
  g.planes = Clip(g.mean[0] - half_x, g.mean[0] + half_x, planes);
  return g;
}

// kLanes voxels of one row; the row ends after the first `room`. Voxels past the support have weight 0, so they need no
// mask.
struct Run {
  int64_t voxel;
  int64_t room;
  float q;           // without its z term
  float first;       // first voxel, from the centre of the row
  float dx, dy, dz;  // offsets from the mean, dz that of the first voxel
};

// Calls body(runs, count) until every voxel of the Gaussian in the planes of `slab` was in a run. Lists of runs keep
// the arithmetic in one long loop, with its constants in place, however short the rows are.
template <typename Body>
void ForEachRun(const Gaussian& g, Interval slab, int64_t size_y, int64_t size_z, const Body& body) {
  constexpr int kRuns = 32;
  Run runs[kRuns];
  int count = 0;
  const int64_t last = std::min(g.planes.last, slab.last);
  for (int64_t x = std::max(g.planes.first, slab.first); x <= last; ++x) {
    const double dx = x - g.mean[0], qx = g.a * dx * dx, centre_y = g.mean[1] - g.shift_y * dx;
    const double half_y = std::sqrt(std::max(radgs::kQMax - qx, 0.0)) * g.half_y;
    const Interval ys = Clip(centre_y - half_y, centre_y + half_y, size_y);
    for (int64_t y = ys.first; y <= ys.last; ++y) {
      const double from_centre = y - centre_y, q = qx + g.b * from_centre * from_centre, dy = y - g.mean[1];
      const double centre_z = g.mean[2] - g.shift_zx * dx - g.shift_zy * dy;
      double half_z = 4.0 * g.half_z;
      // A row that fits one vector costs the same whatever its exact length.
      if (2.0 * half_z > kLanes) half_z = std::sqrt(std::max(radgs::kQMax - q, 0.0)) * g.half_z;
      const Interval zs = Clip(centre_z - half_z, centre_z + half_z, size_z);
      for (int64_t z = zs.first; z <= zs.last; z += kLanes) {
        runs[count++] = {(x * size_y + y) * size_z + z, size_z - z,
                         static_cast<float>(q),         static_cast<float>(z - centre_z),
                         static_cast<float>(dx),        static_cast<float>(dy),
                         static_cast<float>(z - g.mean[2])};
        if (count == kRuns) {
          body(runs, count);
          count = 0;
        }
      }
    }
  }
  body(runs, count);
}

void Draw(const Gaussian& g, float density, Interval slab, int64_t size_y, int64_t size_z, float* volume) {
  const float k_zz = g.k_zz;
  ForEachRun(g, slab, size_y, size_z, [=](const Run* runs, int count) {
    for (int i = 0; i < count; ++i) {
      const Run& run = runs[i];
      const float q = run.q, first = run.first;
      float border[kLanes] = {};
      float* const voxels = volume + run.voxel;
      float* const target = run.room < kLanes ? border : voxels;
      for (int l = 0; l < kLanes; ++l) {
        const float d = first + static_cast<float>(l);
        target[l] += density * radgs::Weight(radgs::ClipQ(q + k_zz * d * d));
      }
      if (run.room < kLanes) {
        for (int64_t l = 0; l < run.room; ++l) voxels[l] += border[l];
      }
    }
  });
}

// With the cotangent c and the offset r: the sums of c w, c w' r (3) and c w' r r' (6).
void Gather(const Gaussian& g, Interval planes, int64_t size_y, int64_t size_z, const float* volume, double* total) {
  const float k_zz = g.k_zz;
  float sums[kSums][kLanes] = {};
  ForEachRun(g, planes, size_y, size_z, [&](const Run* runs, int count) {
    for (int i = 0; i < count; ++i) {
      const Run& run = runs[i];
      const float q = run.q, first = run.first, dx = run.dx, dy = run.dy, dz0 = run.dz;
      float border[kLanes] = {};
      const float* cotangent = volume + run.voxel;
      if (run.room < kLanes) {
        std::copy(cotangent, cotangent + run.room, border);
        cotangent = border;
      }
      for (int l = 0; l < kLanes; ++l) {
        const float d = first + static_cast<float>(l), dz = dz0 + static_cast<float>(l);
        float weight, slope;
        radgs::WeightAndSlope(radgs::ClipQ(q + k_zz * d * d), weight, slope);
        const float s = cotangent[l] * slope, sx = s * dx, sy = s * dy, sz = s * dz;
        sums[0][l] += cotangent[l] * weight;
        sums[1][l] += sx;
        sums[2][l] += sy;
        sums[3][l] += sz;
        sums[4][l] += sx * dx;
        sums[5][l] += sx * dy;
        sums[6][l] += sx * dz;
        sums[7][l] += sy * dy;
        sums[8][l] += sy * dz;
        sums[9][l] += sz * dz;
      }
    }
  });
  for (int i = 0; i < kSums; ++i) {
    total[i] = 0.0;
    for (int l = 0; l < kLanes; ++l) total[i] += sums[i][l];
  }
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                   ffi::Buffer<ffi::F32> precision, ffi::ResultBuffer<ffi::F32> output) {
  const int64_t total = density.element_count();
  float* out = output->typed_data();
  std::fill_n(out, output->element_count(), 0.0f);
  if (total == 0 || output->element_count() == 0) return ffi::Error::Success();
  const auto sizes = output->dimensions().last(3);
  const int64_t size_x = sizes[0], size_y = sizes[1], size_z = sizes[2], size = size_x * size_y * size_z;
  const int64_t n = density.dimensions().back(), volumes = total / n;
  const int64_t slabs = radgs::SlabsPerImage(pool, volumes, size_x);
  const float *rho = density.typed_data(), *m = mean.typed_data(), *K = precision.typed_data();

  // Slabs of one volume share their Gaussians; these are then prepared only once.
  std::unique_ptr<Gaussian[]> shared;
  if (slabs > 1) {
    constexpr int64_t kGrain = 256;
    shared.reset(new (std::nothrow) Gaussian[total]);
    if (!shared) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "voxelize: no memory for the boxes");
    radgs::ParallelFor(pool, (total + kGrain - 1) / kGrain, [&](int64_t block) {
      for (int64_t i = block * kGrain; i < std::min(total, (block + 1) * kGrain); ++i) {
        shared[i] = Prepare(m + 3 * i, K + 6 * i, size_x);
      }
    });
  }
  radgs::ParallelFor(pool, volumes * slabs, [&](int64_t block) {
    const int64_t volume = block / slabs, part = block % slabs;
    const Interval slab = {part * size_x / slabs, (part + 1) * size_x / slabs - 1};
    float* own = out + volume * size;
    for (int64_t i = volume * n; i < (volume + 1) * n; ++i) {
      if (shared) {
        Draw(shared[i], rho[i], slab, size_y, size_z, own);
      } else {
        Draw(Prepare(m + 3 * i, K + 6 * i, size_x), rho[i], slab, size_y, size_z, own);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                    ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> cotangent,
                    ffi::ResultBuffer<ffi::F32> to_density, ffi::ResultBuffer<ffi::F32> to_mean,
                    ffi::ResultBuffer<ffi::F32> to_precision) {
  const int64_t total = density.element_count(), n = density.dimensions().back();
  if (total == 0) return ffi::Error::Success();
  const auto sizes = cotangent.dimensions().last(3);
  const int64_t size_x = sizes[0], size_y = sizes[1], size_z = sizes[2], size = size_x * size_y * size_z;
  const float *rho = density.typed_data(), *m = mean.typed_data(), *K = precision.typed_data();
  const float* c = cotangent.typed_data();
  float *drho = to_density->typed_data(), *dm = to_mean->typed_data(), *dK = to_precision->typed_data();
  constexpr int64_t kGrain = 32;
  radgs::ParallelFor(pool, (total + kGrain - 1) / kGrain, [&](int64_t block) {
    for (int64_t i = block * kGrain; i < std::min(total, (block + 1) * kGrain); ++i) {
      const Gaussian g = Prepare(m + 3 * i, K + 6 * i, size_x);
      if (g.planes.last < g.planes.first) {
        drho[i] = 0.0f;
        std::fill_n(dm + 3 * i, 3, 0.0f);
        std::fill_n(dK + 6 * i, 6, 0.0f);
        continue;
      }
      double sums[kSums];
      Gather(g, g.planes, size_y, size_z, c + (i / n) * size, sums);
      const float* k = K + 6 * i;
      const double turn = -2.0 * rho[i], x = turn * sums[1], y = turn * sums[2], z = turn * sums[3];
      drho[i] = static_cast<float>(sums[0]);
      dm[3 * i] = static_cast<float>(k[0] * x + k[1] * y + k[2] * z);
      dm[3 * i + 1] = static_cast<float>(k[1] * x + k[3] * y + k[4] * z);
      dm[3 * i + 2] = static_cast<float>(k[2] * x + k[4] * y + k[5] * z);
      for (int j = 0; j < 6; ++j) {
        const double count = j == 0 || j == 3 || j == 5 ? 1.0 : 2.0;  // off-diagonal entries stand for two
        dK[6 * i + j] = static_cast<float>(count * rho[i] * sums[4 + j]);
      }
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
