// The footprint of a Gaussian in `splat`, and vectors of pixels. Only splat.cc includes it.
#ifndef RADGS_KERNELS_SPLAT_FOOTPRINT_H_
#define RADGS_KERNELS_SPLAT_FOOTPRINT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "parallel.h"

namespace {

using radgs::Interval;
using radgs::kLanes;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));

constexpr double kHalfLog2E = 0.72134752044448170368;  // exp(-q / 2) = 2^-(kHalfLog2E q)

inline Lanes All(float x) { return x - Lanes{}; }

// The second argument where the first is NaN. GCC makes two operations of a choice between a variable and a constant.
#ifdef __AVX__
inline Lanes Min(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
inline Lanes Max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
#else
inline Lanes Min(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes Max(Lanes a, Lanes b) { return a > b ? a : b; }
#endif

inline Lanes Sqrt(Lanes x) {
  for (int l = 0; l < kLanes; ++l) x[l] = std::sqrt(x[l]);
  return x;
}

// 2^-x for x in [0, 12], relative error below 2e-7: a minimax fit of 2^r on |r| <= 1/2, scaled in the exponent bits.
inline Lanes Exp2Minus(Lanes x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Lanes rounded = kRound - x, r = (rounded - kRound) + x;
  const Lanes r2 = r * r;
  const Lanes p = (1.0f - 0.693147f * r) +
                  r2 * ((0.24022242f - 0.055507336f * r) + r2 * (0.009671513f - 0.0013264727f * r));
  return (Lanes)((Bits)p + ((Bits)rounded << 23));
}

// The quantities of a Gaussian in the loops over pixels.
struct Footprint {
  int32_t top, bottom, left, right;  // pixels that the outline's box holds; bottom < top where nothing is drawn
  float s, t;                        // offset of pixel (left, top) from the projected mean
  // The outline round its centre: t = slope s +- sqrt(chord - taper s^2); it is lowest at s = lowest.
  float centre_s, centre_t, slope, chord, taper, lowest;
  float ss, st2, tt, sz2, tz2;  // alpha = 1 + sz2 s + tz2 t + ss s^2 + st2 s t + tt t^2
  float nss, nst2, ntt;         // kHalfLog2E N = nss s^2 + nst2 s t + ntt t^2
  float ls2, lt2, lss, ltt;     // lambda = |d|^2 over its value at the mean: 1 + ls2 s + lt2 t + lss s^2 + ltt t^2
  float thickness;              // sqrt(2 pi |d|^2 / d'Kd) on the ray through the mean
};

// Exchanges the rows and columns of kLanes x kLanes numbers.
inline void Transpose(Lanes* x) {
#ifdef __AVX__
  Lanes pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + j + 2]);
      fours[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = x[i][j];
      x[i][j] = x[j][i], x[j][i] = kept;
    }
  }
#endif
}

// The same forms of kLanes Gaussians, for their gradients.
struct Forms {
  double K[6][kLanes], x[kLanes], y[kLanes], depth[kLanes], m_zz[kLanes], thickness[kLanes];
  double ss[kLanes], st[kLanes], tt[kLanes], sz[kLanes], tz[kLanes];  // M / M_zz
  double ls[kLanes], lt[kLanes], lss[kLanes], ltt[kLanes];
};

// First and last integer in [low, high] and [0, size), as doubles; first > last where there is none or a bound is NaN.
// The margin keeps pixels that rounding would push over the outline, where the weight is close to 0 anyway.
inline void Clip(double low, double high, double size, double& first, double& last) {
  low = std::ceil(low - 1e-3), high = std::floor(high + 1e-3);
  first = low > 0.0 ? low : 0.0;
  last = high < size - 1.0 ? high : size - 1.0;
}

// Footprints of `count` <= kLanes Gaussians: `mean` (count, 3), `precision` (count, 6), `camera` fx, fy, cx, cy.
void Prepare(const float* mean, const float* precision, int count, const float* camera, int64_t height, int64_t width,
             Footprint* footprints, Forms& f) {
  alignas(32) float p[3][kLanes], K[6][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int own = std::min(l, count - 1);
    for (int i = 0; i < 3; ++i) p[i][l] = mean[3 * own + i];
    for (int i = 0; i < 6; ++i) K[i][l] = precision[6 * own + i];
  }
  const double fx = camera[0], fy = camera[1], cx = camera[2], cy = camera[3], ifx = 1.0 / fx, ify = 1.0 / fy;
  const double rows = height, columns = width;
  alignas(32) double first_row[kLanes], last_row[kLanes], first_column[kLanes], last_column[kLanes];
  alignas(32) double u[kLanes], v[kLanes];
  alignas(32) double nss[kLanes], nst[kLanes], ntt[kLanes], centre_s[kLanes], centre_t[kLanes], slope[kLanes];
  alignas(32) double chord[kLanes], taper[kLanes], lowest[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const double xx = K[0][l], xy = K[1][l], xz = K[2][l], yy = K[3][l], yz = K[4][l], zz = K[5][l], depth = p[2][l];
    const double minor = xx * yy - xy * xy;
    const double determinant = xx * (yy * zz - yz * yz) + xy * (xz * yz - xy * zz) + xz * (xy * yz - xz * yy);
    const double covariance_zz = minor / determinant, per_depth = 1.0 / depth;
    const double x = p[0][l] * per_depth, y = p[1][l] * per_depth;
    const double m_x = xx * x + xy * y + xz, m_y = xy * x + yy * y + yz, m_z = xz * x + yz * y + zz;
    const double m_zz = x * m_x + y * m_y + m_z, per_m = 1.0 / m_zz;
    const double ss = xx * (ifx * ifx) * per_m, st = xy * (ifx * ify) * per_m, tt = yy * (ify * ify) * per_m;
    const double sz = m_x * ifx * per_m, tz = m_y * ify * per_m, scale = depth * depth * m_zz;
    nss[l] = scale * (ss - sz * sz), nst[l] = scale * (st - sz * tz), ntt[l] = scale * (tt - tz * tz);
    // The outline is the conic N - 16 alpha = 0.
    const double q = radgs::kQMax, css = nss[l] - q * ss, cst = nst[l] - q * st, ctt = ntt[l] - q * tt;
    const double cs = -q * sz, ct = -q * tz, area = css * ctt - cst * cst;
    const double size = css * ct * ct + ctt * cs * cs - 2.0 * cst * cs * ct + q * area;
    const double per_area = 1.0 / area, per_both = 1.0 / (css * ctt), per_tt = css * per_both;
    const double reach_s = std::sqrt(ctt * size) * per_area, reach_t = std::sqrt(css * size) * per_area;
    const double middle_s = (cst * ct - ctt * cs) * per_area, middle_t = (cst * cs - css * ct) * per_area;
    centre_s[l] = middle_s, centre_t[l] = middle_t;
    slope[l] = -cst * per_tt, chord[l] = size * per_area * per_tt, taper[l] = area * per_tt * per_tt;
    lowest[l] = -cst * ctt * per_both * reach_t;
    u[l] = cx + fx * x, v[l] = cy + fy * y;
    Clip(u[l] + middle_s - reach_s, u[l] + middle_s + reach_s, columns, first_column[l], last_column[l]);
    Clip(v[l] + middle_t - reach_t, v[l] + middle_t + reach_t, rows, first_row[l], last_row[l]);
    // These conditions hold where `visible` does, except for a precision that is hardly positive definite or a mean on the border.
    const double finite = 0.0 * (p[0][l] + p[1][l] + depth + xx + xy + xz + yy + yz + zz);
    const bool drawn = (finite == 0.0) & (depth > 0.0) & (depth * depth > q * covariance_zz) & (m_zz > 0.0) &
                       (css > 0.0) & (area > 0.0) & (size > 0.0) & (xx + yy + zz < radgs::kTraceMax) &
                       (first_column[l] <= last_column[l]) & (first_row[l] <= last_row[l]);
    first_row[l] = drawn ? first_row[l] : 0.0, last_row[l] = drawn ? last_row[l] : -1.0;
    first_column[l] = drawn ? first_column[l] : 0.0, last_column[l] = drawn ? last_column[l] : -1.0;
    const double length2 = 1.0 + x * x + y * y, per_length2 = 1.0 / length2;
    f.thickness[l] = std::sqrt(2.0 * M_PI * length2 * per_m);
    f.K[0][l] = xx, f.K[1][l] = xy, f.K[2][l] = xz, f.K[3][l] = yy, f.K[4][l] = yz, f.K[5][l] = zz;
    f.x[l] = x, f.y[l] = y, f.depth[l] = depth, f.m_zz[l] = m_zz;
    f.ss[l] = ss, f.st[l] = st, f.tt[l] = tt, f.sz[l] = sz, f.tz[l] = tz;
    f.ls[l] = x * ifx * per_length2, f.lt[l] = y * ify * per_length2;
    f.lss[l] = ifx * ifx * per_length2, f.ltt[l] = ify * ify * per_length2;
  }
  for (int l = 0; l < count; ++l) {
    Footprint& g = footprints[l];
    g.top = static_cast<int32_t>(first_row[l]), g.bottom = static_cast<int32_t>(last_row[l]);
    g.left = static_cast<int32_t>(first_column[l]), g.right = static_cast<int32_t>(last_column[l]);
    g.s = first_column[l] - u[l], g.t = first_row[l] - v[l];
    g.centre_s = centre_s[l], g.centre_t = centre_t[l], g.slope = slope[l];
    g.chord = chord[l], g.taper = taper[l], g.lowest = lowest[l];
    g.ss = f.ss[l], g.st2 = 2.0 * f.st[l], g.tt = f.tt[l], g.sz2 = 2.0 * f.sz[l], g.tz2 = 2.0 * f.tz[l];
    g.nss = kHalfLog2E * nss[l], g.nst2 = 2.0 * kHalfLog2E * nst[l], g.ntt = kHalfLog2E * ntt[l];
    g.ls2 = 2.0 * f.ls[l], g.lt2 = 2.0 * f.lt[l];
    g.lss = f.lss[l], g.ltt = f.ltt[l];
    g.thickness = f.thickness[l];
  }
}

}  // namespace

#endif  // RADGS_KERNELS_SPLAT_FOOTPRINT_H_
