// `splat` and its gradient on the CPU: rows of pixels in vector registers, work split over XLA's own threads.
//
// All forms are written in pixel offsets (s, t) from the projected mean p: the ray is d = P (s, t, 1) for the matrix P
// with columns (1 / fx, 0, 0), (0, 1 / fy, 0) and p / p_z. The precision becomes M = P' K P and the mean (0, 0, p_z),
// and the shift of the closest point along the ray, r and q become
//   shift = -p_z * beta / alpha, r = -P ((p_z + shift) s, (p_z + shift) t, shift), q = N / alpha,
// where alpha = d'Kd / M_zz = 1 + (linear part) + (quadratic part), beta = (linear part) / 2 + (quadratic part) and N
// is a pure quadratic form in (s, t). No large numbers cancel, so float32 does; the coefficients, computed once per
// Gaussian, are double.
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

constexpr int kSums = 14;
constexpr int kRuns = 32;  // runs worked on at a time

struct Gaussian {
  Interval rows;                     // pixel rows that hold q < 16; empty for a Gaussian that is not drawn
  double u, v;                       // projected mean, pixels
  double root0, root1, root2;        // half-width of row t: sqrt(root0 + root1 t + root2 t^2) * inverse
  double middle0, middle1, inverse;  // centre of row t: -(middle0 + middle1 t) * inverse
  float ss, st, tt, sz, tz;          // M / M_zz
  float nss, nst2, ntt;              // N = nss s^2 + nst2 s t + ntt t^2
  float ls, lt, lss, ltt;            // |d|^2 relative to its value at the mean: 1 + 2 ls s + 2 lt t + lss s^2 + ltt t^2
  double thickness;                  // sqrt(2 pi |d|^2 / d'Kd) on the ray through the mean
  double x, y, m_zz;
};

// `mean` 3, `precision` 6, `camera` fx, fy, cx, cy.
Gaussian Prepare(const float* mean, const float* precision, const float* camera, int64_t height) {
  Gaussian g = {};
  if (!radgs::AllFinite(mean, 3) || !radgs::AllFinite(precision, 6)) return g;
  const double xx = precision[0], xy = precision[1], xz = precision[2], yy = precision[3], yz = precision[4];
  const double zz = precision[5], depth = mean[2], fx = camera[0], fy = camera[1];
  const double determinant = xx * (yy * zz - yz * yz) + xy * (xz * yz - xy * zz) + xz * (xy * yz - xz * yy);
  const double covariance_zz = (xx * yy - xy * xy) / determinant;
  if (!(depth > 4.0 * std::sqrt(std::max(covariance_zz, 0.0)))) return g;
  g.x = mean[0] / depth, g.y = mean[1] / depth;
  const double m_x = xx * g.x + xy * g.y + xz, m_y = xy * g.x + yy * g.y + yz, m_z = xz * g.x + yz * g.y + zz;
  g.m_zz = g.x * m_x + g.y * m_y + m_z;
  const double ss = xx / (fx * fx * g.m_zz), st = xy / (fx * fy * g.m_zz), tt = yy / (fy * fy * g.m_zz);
  const double sz = m_x / (fx * g.m_zz), tz = m_y / (fy * g.m_zz), scale = depth * depth * g.m_zz;
  const double nss = scale * (ss - sz * sz), nst = scale * (st - sz * tz), ntt = scale * (tt - tz * tz);
  // The outline is the conic N - 16 alpha = 0, a quadratic in s for each row; its discriminant is a quadratic in t.
  const double q = radgs::kQMax, css = nss - q * ss, cst = nst - q * st, ctt = ntt - q * tt, cs = -q * sz, ct = -q * tz;
  g.root0 = cs * cs + css * q, g.root1 = 2.0 * (cst * cs - css * ct), g.root2 = cst * cst - css * ctt;
  const double half = std::sqrt(0.25 * g.root1 * g.root1 - g.root0 * g.root2);
  // Only a precision that is not positive definite, or a mean on the border of `visible`, fails here.
  if (!(g.m_zz > 0.0 && css > 0.0 && g.root2 < 0.0 && half > 0.0)) return g;
  g.middle0 = cs, g.middle1 = cst, g.inverse = 1.0 / css;
  g.u = camera[2] + fx * g.x, g.v = camera[3] + fy * g.y;
  g.rows = Clip(g.v + (0.5 * g.root1 - half) / -g.root2, g.v + (0.5 * g.root1 + half) / -g.root2, height);
  const double length2 = 1.0 + g.x * g.x + g.y * g.y;
  g.thickness = std::sqrt(2.0 * M_PI * length2 / g.m_zz);
  g.ss = ss, g.st = st, g.tt = tt, g.sz = sz, g.tz = tz;
  g.nss = nss, g.nst2 = 2.0 * nst, g.ntt = ntt;
  g.ls = g.x / (fx * length2), g.lt = g.y / (fy * length2);
  g.lss = 1.0 / (fx * fx * length2), g.ltt = 1.0 / (fy * fy * length2);
  return g;
}

// kLanes pixels of one row; the image ends after the first `room`. Pixels past the outline have weight 0, so they need
// no mask.
struct Run {
  int64_t pixel;
  int64_t room;
  float s, t;
};

// Calls body(runs, count) until every pixel of the Gaussian in the rows of `band` was in a run. Lists of runs keep the
// arithmetic in one long loop, with its constants in place, however short the rows are.
template <typename Body>
void ForEachRun(const Gaussian& g, Interval band, int64_t width, const Body& body) {
  Run runs[kRuns];
  int count = 0;
  const int64_t last = std::min(g.rows.last, band.last);
  for (int64_t v = std::max(g.rows.first, band.first); v <= last; ++v) {
    const double t = v - g.v, middle = g.u - (g.middle0 + t * g.middle1) * g.inverse;
    const double half = std::sqrt(std::max(g.root0 + t * (g.root1 + t * g.root2), 0.0)) * g.inverse;
    const Interval columns = Clip(middle - half, middle + half, width);
    for (int64_t u = columns.first; u <= columns.last; u += kLanes) {
      runs[count++] = {v * width + u, width - u, static_cast<float>(u - g.u), static_cast<float>(t)};
      if (count == kRuns) {
        body(runs, count);
        count = 0;
      }
    }
  }
  body(runs, count);
}

void Draw(const Gaussian& g, float amplitude, Interval band, int64_t width, float* image) {
  const float ss = g.ss, st2 = 2.0f * g.st, tt = g.tt, sz2 = 2.0f * g.sz, tz2 = 2.0f * g.tz;
  const float nss = g.nss, nst2 = g.nst2, ntt = g.ntt, ls2 = 2.0f * g.ls, lt2 = 2.0f * g.lt, lss = g.lss, ltt = g.ltt;
  ForEachRun(g, band, width, [=](const Run* runs, int count) {
    for (int i = 0; i < count; ++i) {
      const Run& run = runs[i];
      const float t = run.t, first = run.s;
      const float alpha0 = 1.0f + t * (tz2 + t * tt), alpha1 = sz2 + t * st2;
      const float n0 = t * t * ntt, n1 = t * nst2, lambda0 = 1.0f + t * (lt2 + t * ltt);
      float border[kLanes] = {};
      float* const pixels = image + run.pixel;
      float* const target = run.room < kLanes ? border : pixels;
      for (int l = 0; l < kLanes; ++l) {
        const float s = first + static_cast<float>(l);
        const float alpha = alpha0 + s * (alpha1 + s * ss), lambda = lambda0 + s * (ls2 + s * lss);
        const float inverse = 1.0f / alpha;
        const float q = radgs::ClipQ((n0 + s * (n1 + s * nss)) * inverse);
        target[l] += amplitude * std::sqrt(lambda * inverse) * radgs::Weight(q);
      }
      if (run.room < kLanes) {
        for (int64_t l = 0; l < run.room; ++l) pixels[l] += border[l];
      }
    }
  });
}

// The sums over pixels that the gradients are linear in. With the cotangent c, h = c sqrt(lambda / alpha),
// e = (D s, D t, shift / p_z), D = 1 + shift / p_z, k = p_z^2 M_zz h w'(q), o = (s, t, 1):
// h w; k e (3); k e e' - h w o o' / (2 alpha) (ss, st, sz, tt, tz, zz); b_s s, b_t t, b_s, b_t, where b is the gradient
// to the offset at a fixed Gaussian.
void Gather(const Gaussian& g, double depth, int64_t width, const float* image, double* total) {
  const float ss = g.ss, st = g.st, tt = g.tt, sz = g.sz, tz = g.tz, nss = g.nss, nst2 = g.nst2, ntt = g.ntt;
  const float ls = g.ls, lt = g.lt, lss = g.lss, ltt = g.ltt, scale = static_cast<float>(depth * depth * g.m_zz);
  float sums[kSums][kLanes] = {};
  ForEachRun(g, g.rows, width, [&](const Run* runs, int count) {
    // First the long chains of dependent operations, then the many products: each kind overlaps better by itself.
    float units[kRuns][kLanes], slopes[kRuns][kLanes], alphas[kRuns][kLanes], lambdas[kRuns][kLanes];
    for (int i = 0; i < count; ++i) {
      const Run& run = runs[i];
      const float t = run.t, first = run.s;
      const float alpha0 = 1.0f + t * (2.0f * tz + t * tt), alpha1 = 2.0f * (sz + t * st);
      const float n0 = t * t * ntt, n1 = t * nst2, lambda0 = 1.0f + t * (2.0f * lt + t * ltt);
      float border[kLanes] = {};
      const float* cotangent = image + run.pixel;
      if (run.room < kLanes) {
        std::copy(cotangent, cotangent + run.room, border);
        cotangent = border;
      }
      for (int l = 0; l < kLanes; ++l) {
        const float s = first + static_cast<float>(l);
        const float alpha = alpha0 + s * (alpha1 + s * ss), lambda = lambda0 + s * (2.0f * ls + s * lss);
        const float both = 1.0f / (alpha * lambda), inverse = lambda * both;
        float weight, slope;
        radgs::WeightAndSlope(radgs::ClipQ((n0 + s * (n1 + s * nss)) * inverse), weight, slope);
        const float h = cotangent[l] * std::sqrt(lambda * inverse);
        units[i][l] = h * weight;
        slopes[i][l] = scale * h * slope;
        alphas[i][l] = inverse;
        lambdas[i][l] = alpha * both;
      }
    }
    for (int i = 0; i < count; ++i) {
      const float t = runs[i].t, first = runs[i].s;
      const float beta0 = t * (tz + t * tt), beta1 = sz + 2.0f * t * st;
      const float bend_s = sz + t * st, bend_t = tz + t * tt, length_t = lt + t * ltt;
      for (int l = 0; l < kLanes; ++l) {
        const float s = first + static_cast<float>(l);
        const float unit = units[i][l], k = slopes[i][l], inverse = alphas[i][l];
        const float ez = -(beta0 + s * (beta1 + s * ss)) * inverse, d = 1.0f + ez, es = d * s, et = d * t;
        const float ks = k * es, kt = k * et, kz = k * ez;
        const float unit_a = unit * inverse, along = -0.5f * unit_a, along_s = along * s, along_t = along * t;
        const float turn = 2.0f * k * d, span = unit * lambdas[i][l];
        const float bs = span * (ls + s * lss) - unit_a * (bend_s + s * ss) + turn * (ss * es + st * et + sz * ez);
        const float bt = span * length_t - unit_a * (bend_t + s * st) + turn * (st * es + tt * et + tz * ez);
        sums[0][l] += unit;
        sums[1][l] += ks;
        sums[2][l] += kt;
        sums[3][l] += kz;
        sums[4][l] += ks * es + along_s * s;
        sums[5][l] += ks * et + along_s * t;
        sums[6][l] += ks * ez + along_s;
        sums[7][l] += kt * et + along_t * t;
        sums[8][l] += kt * ez + along_t;
        sums[9][l] += kz * ez + along;
        sums[10][l] += bs * s;
        sums[11][l] += bt * t;
        sums[12][l] += bs;
        sums[13][l] += bt;
      }
    }
  });
  for (int i = 0; i < kSums; ++i) {
    total[i] = 0.0;
    for (int l = 0; l < kLanes; ++l) total[i] += sums[i][l];
  }
}

// Gradients from the sums: density 1, mean 3, precision 6, camera 4.
void Gradients(const Gaussian& g, const double* sums, double density, double depth, const float* precision,
               const float* camera, float* to_density, float* to_mean, float* to_precision, float* to_camera) {
  const double amplitude = density * g.thickness, fx = camera[0], fy = camera[1], x = g.x, y = g.y;
  *to_density = static_cast<float>(g.thickness * sums[0]);

  const double turn = -2.0 * amplitude / (depth * g.m_zz);
  const double rz = turn * sums[3], rx = turn * sums[1] / fx + x * rz, ry = turn * sums[2] / fy + y * rz;
  const float* K = precision;
  to_mean[0] = static_cast<float>(K[0] * rx + K[1] * ry + K[2] * rz);
  to_mean[1] = static_cast<float>(K[1] * rx + K[3] * ry + K[4] * rz);
  to_mean[2] = static_cast<float>(K[2] * rx + K[4] * ry + K[5] * rz);

  const double scale = amplitude / g.m_zz;
  const double xx = scale * sums[4] / (fx * fx), xy = scale * sums[5] / (fx * fy), xz = scale * sums[6] / fx;
  const double yy = scale * sums[7] / (fy * fy), yz = scale * sums[8] / fy, zz = scale * sums[9];
  to_precision[0] = static_cast<float>(xx + 2.0 * x * xz + x * x * zz);
  to_precision[1] = static_cast<float>(2.0 * (xy + x * yz + y * xz + x * y * zz));
  to_precision[2] = static_cast<float>(2.0 * (xz + x * zz));
  to_precision[3] = static_cast<float>(yy + 2.0 * y * yz + y * y * zz);
  to_precision[4] = static_cast<float>(2.0 * (yz + y * zz));
  to_precision[5] = static_cast<float>(zz);

  to_camera[0] = static_cast<float>(-amplitude * (x * sums[12] + sums[10] / fx));
  to_camera[1] = static_cast<float>(-amplitude * (y * sums[13] + sums[11] / fy));
  to_camera[2] = static_cast<float>(-amplitude * sums[12]);
  to_camera[3] = static_cast<float>(-amplitude * sums[13]);
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                   ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> camera, ffi::ResultBuffer<ffi::F32> output) {
  const int64_t total = density.element_count(), images = camera.element_count() / 4;
  float* out = output->typed_data();
  std::fill_n(out, output->element_count(), 0.0f);
  if (total == 0 || output->element_count() == 0) return ffi::Error::Success();
  const int64_t n = total / images, width = output->dimensions().back(), size = output->element_count() / images;
  const int64_t height = size / width, bands = radgs::SlabsPerImage(pool, images, height);
  const float *rho = density.typed_data(), *p = mean.typed_data(), *K = precision.typed_data();
  const float* k = camera.typed_data();
  const auto prepare = [=](int64_t i) { return Prepare(p + 3 * i, K + 6 * i, k + 4 * (i / n), height); };

  // Bands of one image share their Gaussians; these are then prepared only once.
  std::unique_ptr<Gaussian[]> shared;
  if (bands > 1) {
    constexpr int64_t kGrain = 256;
    shared.reset(new (std::nothrow) Gaussian[total]);
    if (!shared) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "splat: no memory for the footprints");
    radgs::ParallelFor(pool, (total + kGrain - 1) / kGrain, [&](int64_t block) {
      for (int64_t i = block * kGrain; i < std::min(total, (block + 1) * kGrain); ++i) shared[i] = prepare(i);
    });
  }
  radgs::ParallelFor(pool, images * bands, [&](int64_t block) {
    const int64_t image = block / bands, slab = block % bands;
    const Interval band = {slab * height / bands, (slab + 1) * height / bands - 1};
    const auto draw = [&](const Gaussian& g, int64_t i) {
      Draw(g, static_cast<float>(rho[i] * g.thickness), band, width, out + image * size);
    };
    for (int64_t i = image * n; i < (image + 1) * n; ++i) {
      if (shared) {
        draw(shared[i], i);
      } else {
        draw(prepare(i), i);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                    ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> camera, ffi::Buffer<ffi::F32> cotangent,
                    ffi::ResultBuffer<ffi::F32> to_density, ffi::ResultBuffer<ffi::F32> to_mean,
                    ffi::ResultBuffer<ffi::F32> to_precision, ffi::ResultBuffer<ffi::F32> to_camera) {
  const int64_t total = density.element_count();
  if (total == 0) return ffi::Error::Success();
  const int64_t images = camera.element_count() / 4, n = total / images, size = cotangent.element_count() / images;
  const int64_t width = cotangent.dimensions().back(), height = width == 0 ? 0 : size / width;
  const float *rho = density.typed_data(), *p = mean.typed_data(), *K = precision.typed_data();
  const float* k = camera.typed_data();
  const float* c = cotangent.typed_data();
  float *drho = to_density->typed_data(), *dp = to_mean->typed_data(), *dK = to_precision->typed_data();
  float* dk = to_camera->typed_data();
  constexpr int64_t kGrain = 32;
  radgs::ParallelFor(pool, (total + kGrain - 1) / kGrain, [&](int64_t block) {
    for (int64_t i = block * kGrain; i < std::min(total, (block + 1) * kGrain); ++i) {
      const float* own = k + 4 * (i / n);
      const Gaussian g = Prepare(p + 3 * i, K + 6 * i, own, height);
      if (g.rows.last < g.rows.first) {
        drho[i] = 0.0f;
        std::fill_n(dp + 3 * i, 3, 0.0f);
        std::fill_n(dK + 6 * i, 6, 0.0f);
        std::fill_n(dk + 4 * i, 4, 0.0f);
        continue;
      }
      double sums[kSums];
      Gather(g, p[3 * i + 2], width, c + (i / n) * size, sums);
      Gradients(g, sums, rho[i], p[3 * i + 2], K + 6 * i, own, drho + i, dp + 3 * i, dK + 6 * i, dk + 4 * i);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsSplatForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsSplatBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
