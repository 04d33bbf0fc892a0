// `splat` and its gradient on the CPU: columns of pixels in vector registers, work split over XLA's own threads.
//
// All forms are written in pixel offsets (s, t) from the projected mean p: the ray is d = P (s, t, 1) for the matrix P
// with columns (1 / fx, 0, 0), (0, 1 / fy, 0) and p / p_z. The precision becomes M = P' K P and the mean (0, 0, p_z),
// and the shift of the closest point along the ray, r and q become
//   shift = -p_z * beta / alpha, r = -P ((p_z + shift) s, (p_z + shift) t, shift), q = N / alpha,
// where alpha = d'Kd / M_zz = 1 + 2 linear + quadratic, beta = linear + quadratic and N is a pure quadratic form in
// (s, t). No large numbers cancel, so float32 does; the coefficients, computed once per Gaussian, are double.
//
// The outline q = 16 is an ellipse. It is cut into strips kLanes columns wide, so that a lane keeps its s while t walks
// down the rows: the loop over rows needs few operations, and in the gradient sums with powers of t only.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

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

// What the loops over pixels need of a Gaussian.
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
    // Only a precision that is not positive definite, or a mean on the border of `visible`, fails beside `visible`.
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

// kLanes columns of a footprint. Pixels past the outline have weight 0, so they need no mask.
struct Strip {
  Lanes s;
  int32_t column, room;  // its first column, and how many the image has from there on
  int32_t first, last;   // its rows, from the footprint's first
};

// Calls body(strip) until every pixel of the Gaussian in the rows of `band` was in a strip.
template <typename Body>
inline void ForEachStrip(const Footprint& g, Interval band, int64_t width, const Body& body) {
  constexpr Lanes kSteps = {0, 1, 2, 3, 4, 5, 6, 7};
  const float band_first = static_cast<float>(std::max<int64_t>(band.first - g.top, 0));
  const float band_last = static_cast<float>(std::min<int64_t>(band.last, g.bottom) - g.top);
  const float up = g.centre_t - g.t - 1e-3f, down = g.centre_t - g.t + 1e-3f;
  for (int32_t column = g.left; column <= g.right; column += kLanes) {
    const float s = g.s + static_cast<float>(column - g.left);
    // The strip's lowest and highest point, s being from the outline's centre here.
    const float from = s - g.centre_s, to = from + static_cast<float>(kLanes - 1);
    const float low = std::min(std::max(g.lowest, from), to), high = std::min(std::max(-g.lowest, from), to);
    const float bottom = down + g.slope * low + std::sqrt(std::abs(g.chord - g.taper * low * low));
    const float top = up + g.slope * high - std::sqrt(std::abs(g.chord - g.taper * high * high));
    // At the outline's ends rounding may make a root's argument negative. In this order a NaN leaves the whole band.
    const float first = std::max(band_first, std::ceil(top)), last = std::min(band_last, std::floor(bottom));
    if (first > last) continue;
    body(Strip{s + kSteps, column, static_cast<int32_t>(std::min<int64_t>(width - column, kLanes)),
               static_cast<int32_t>(first), static_cast<int32_t>(last)});
  }
}

inline Lanes Load(const float* pixels, int room) {
  Lanes x = {};
  __builtin_memcpy(&x, pixels, sizeof(float) * room);
  return x;
}

inline void Store(Lanes x, float* pixels, int room) { __builtin_memcpy(pixels, &x, sizeof(float) * room); }

// alpha, N and lambda on a strip, as polynomials in t.
struct StripForms {
  Lanes alpha0, alpha1, n0, n1, lambda0;
  Lanes tt, ntt, lt2, ltt;

  StripForms(const Footprint& g, Lanes s)
      : alpha0(1.0f + s * (g.sz2 + s * g.ss)), alpha1(g.tz2 + s * g.st2), n0(s * s * g.nss), n1(s * g.nst2),
        lambda0(1.0f + s * (g.ls2 + s * g.lss)), tt(All(g.tt)), ntt(All(g.ntt)), lt2(All(g.lt2)), ltt(All(g.ltt)) {}
};

constexpr float kTiny = 1e-30f;  // least alpha; rounding could leave a negative one to an extreme Gaussian
constexpr float kFadeSlope = 1.0f / (radgs::kQMax - radgs::kQFade);
// The exponent is x = kHalfLog2E q.
constexpr float kXMax = static_cast<float>(kHalfLog2E * radgs::kQMax);
constexpr float kFadeX = static_cast<float>(kFadeSlope / kHalfLog2E);

// Rows worked on at a time. A pixel's long chain of dependent operations is cut into loops over these: of shorter
// bodies the processor overlaps more.
constexpr int kRows = 32;

template <bool kBorder>
inline void DrawStrip(const Footprint& g, float amplitude, const Strip& strip, int64_t width, float* image) {
  const StripForms f(g, strip.s);
  const int room = kBorder ? strip.room : kLanes;
  float* pixels = image + (g.top + strip.first) * width + strip.column;
  const Lanes fade3 = All(3.0f * amplitude), fade2 = All(-2.0f * amplitude);
  Lanes row = All(static_cast<float>(strip.first)), xs[kRows], roots[kRows];
  for (int32_t rest = strip.last - strip.first + 1; rest > 0; rest -= kRows) {
    const int count = std::min(rest, kRows);
    for (int i = 0; i < count; ++i, row += 1.0f) {
      const Lanes t = g.t + row;
      const Lanes alpha = Max(f.alpha0 + t * (f.alpha1 + t * f.tt), All(kTiny));
      const Lanes lambda = f.lambda0 + t * (f.lt2 + t * f.ltt), inverse = 1.0f / alpha;
      xs[i] = Max(Min((f.n0 + t * (f.n1 + t * f.ntt)) * inverse, All(kXMax)), Lanes{});
      roots[i] = Sqrt(lambda * inverse);
    }
    for (int i = 0; i < count; ++i, pixels += width) {
      const Lanes x = xs[i], fade = Min((kXMax - x) * kFadeX, All(1.0f));
      const Lanes weight = Exp2Minus(x) * (fade * fade * (fade3 + fade2 * fade));
      Store(Load(pixels, room) + roots[i] * weight, pixels, room);
    }
  }
}

inline void Draw(const Footprint& g, float amplitude, Interval band, int64_t width, float* image) {
  ForEachStrip(g, band, width, [&](const Strip& strip) {
    if (strip.room == kLanes) {
      DrawStrip<false>(g, amplitude, strip, width, image);
    } else {
      DrawStrip<true>(g, amplitude, strip, width, image);
    }
  });
}

// The gradients are linear in moments, sums over pixels of a cotangent times s^i t^j. With h = c sqrt(lambda / alpha)
// for the image's cotangent c: `turn` of h w'(q) / alpha^2 (i + j <= 4), `pull` of h w / alpha and `span` of
// h w / lambda (i + j <= 2), which only the gradient to the camera needs.
constexpr int kTurn = 15, kPull = 6, kSpan = 6;
template <bool kCamera>
constexpr int kMoments = kTurn + kPull + (kCamera ? kSpan : 0);

// Place of s^i t^j among the moments with i + j <= degree.
constexpr int At(int i, int j, int degree) { return i * (degree + 1) - i * (i - 1) / 2 + j; }

// Adds a strip to the moments, lane by lane; without `more` it sets them.
template <bool kCamera, bool kBorder>
inline void GatherStrip(const Footprint& g, const Strip& strip, int64_t width, const float* image, bool more,
                        Lanes* moments) {
  const StripForms f(g, strip.s);
  const int room = kBorder ? strip.room : kLanes;
  const float* pixels = image + (g.top + strip.first) * width + strip.column;
  // Sums of t^j, named so that they stay in registers.
  const Lanes zero = {};
  Lanes turn0 = zero, turn1 = zero, turn2 = zero, turn3 = zero, turn4 = zero;
  Lanes pull0 = zero, pull1 = zero, pull2 = zero, span0 = zero, span1 = zero, span2 = zero;
  Lanes row = All(static_cast<float>(strip.first)), ts[kRows], xs[kRows], hs[kRows];
  Lanes inverses[kRows], lambdas[kRows], turns[kRows], pulls[kRows], spans[kRows];
  for (int32_t rest = strip.last - strip.first + 1; rest > 0; rest -= kRows) {
    const int count = std::min(rest, kRows);
    for (int i = 0; i < count; ++i, row += 1.0f, pixels += width) {
      const Lanes t = g.t + row;
      const Lanes alpha = Max(f.alpha0 + t * (f.alpha1 + t * f.tt), All(kTiny));
      const Lanes lambda = f.lambda0 + t * (f.lt2 + t * f.ltt);
      const Lanes both = 1.0f / (kCamera ? alpha * lambda : alpha), inverse = kCamera ? lambda * both : both;
      xs[i] = Max(Min((f.n0 + t * (f.n1 + t * f.ntt)) * inverse, All(kXMax)), Lanes{});
      hs[i] = Load(pixels, room) * Sqrt(lambda * inverse);
      ts[i] = t;
      inverses[i] = inverse;
      if (kCamera) lambdas[i] = alpha * both;  // 1 / lambda
    }
    for (int i = 0; i < count; ++i) {
      const Lanes x = xs[i], s = Min((kXMax - x) * kFadeX, All(1.0f));
      const Lanes h = hs[i] * Exp2Minus(x), fade = s * s * (3.0f - 2.0f * s);
      const Lanes unit = h * fade, slope = (s * s - s) * (6.0f * kFadeSlope) - 0.5f * fade;
      const Lanes inverse = inverses[i];
      turns[i] = h * inverse * (slope * inverse);
      pulls[i] = unit * inverse;
      if (kCamera) spans[i] = unit * lambdas[i];
    }
    for (int i = 0; i < count; ++i) {
      const Lanes t = ts[i], t2 = t * t, turn = turns[i], turn_t2 = turn * t2;
      turn0 += turn, turn1 += turn * t, turn2 += turn_t2, turn3 += turn_t2 * t, turn4 += turn_t2 * t2;
      pull0 += pulls[i], pull1 += pulls[i] * t, pull2 += pulls[i] * t2;
      if (kCamera) span0 += spans[i], span1 += spans[i] * t, span2 += spans[i] * t2;
    }
  }
  const Lanes turn[5] = {turn0, turn1, turn2, turn3, turn4}, pull[3] = {pull0, pull1, pull2};
  const Lanes span[3] = {span0, span1, span2};
  const auto fold = [&](const auto& put) {
    Lanes power = All(1.0f);
    for (int i = 0; i < 5; ++i, power *= strip.s) {
      for (int j = 0; i + j < 5; ++j) put(moments[At(i, j, 4)], power * turn[j]);
      for (int j = 0; i + j < 3; ++j) {
        put(moments[kTurn + At(i, j, 2)], power * pull[j]);
        if (kCamera) put(moments[kTurn + kPull + At(i, j, 2)], power * span[j]);
      }
    }
  };
  if (more) {
    fold([](Lanes& sum, Lanes x) { sum += x; });
  } else {
    fold([](Lanes& sum, Lanes x) { sum = x; });
  }
}

// Moments of one Gaussian, lane by lane.
template <bool kCamera>
inline void Gather(const Footprint& g, int64_t height, int64_t width, const float* image, Lanes* moments) {
  bool any = false;
  ForEachStrip(g, {0, height - 1}, width, [&](const Strip& strip) {
    if (strip.room == kLanes) {
      GatherStrip<kCamera, false>(g, strip, width, image, any, moments);
    } else {
      GatherStrip<kCamera, true>(g, strip, width, image, any, moments);
    }
    any = true;
  });
  if (!any) std::fill_n(moments, kMoments<kCamera>, Lanes{});
}

// The sums of the lanes of x[0], x[stride], ..., kLanes sums.
inline Lanes SumsOfLanes(const Lanes* x, int stride) {
  Lanes y[kLanes];
  for (int l = 0; l < kLanes; ++l) y[l] = x[l * stride];
  Transpose(y);
  return ((y[0] + y[1]) + (y[2] + y[3])) + ((y[4] + y[5]) + (y[6] + y[7]));
}

// Gradients of kLanes Gaussians from their moments: density 1, mean 3, precision 6 and, with kCamera, camera 4.
// With L = 1 + linear, Q = beta = linear + quadratic and alpha = L + Q, the closest point is r = -p_z P e / alpha with
// e = (L s, L t, -Q), and h w' enters with the polynomials e e' / alpha^2 and e / alpha = (L + Q) e / alpha^2 only.
template <bool kCamera>
void Gradients(const Forms& f, const double (*totals)[kLanes], const float* density, const float* camera,
               float (*out)[kLanes]) {
  const double ifx = 1.0 / camera[0], ify = 1.0 / camera[1];
  for (int l = 0; l < kLanes; ++l) {
    const auto turn = [&](int i, int j) { return totals[At(i, j, 4)][l]; };
    const auto pull = [&](int i, int j) { return totals[kTurn + At(i, j, 2)][l]; };
    const auto span = [&](int i, int j) { return totals[kTurn + kPull + At(i, j, 2)][l]; };
    const double a = f.sz[l], b = f.tz[l], A = f.ss[l], B = f.st[l], C = f.tt[l];
    // L^2 and L Q less their constant parts, and Q^2.
    const double ll10 = 2.0 * a, ll01 = 2.0 * b, ll20 = a * a, ll11 = 2.0 * a * b, ll02 = b * b;
    const double q20 = A + ll20, q11 = 2.0 * B + ll11, q02 = C + ll02;
    const double q30 = a * A, q21 = 2.0 * a * B + b * A, q12 = a * C + 2.0 * b * B, q03 = b * C;
    const auto with_ll = [&](int i, int j) {
      return turn(i, j) + ll10 * turn(i + 1, j) + ll01 * turn(i, j + 1) + ll20 * turn(i + 2, j) +
             ll11 * turn(i + 1, j + 1) + ll02 * turn(i, j + 2);
    };
    const auto with_lq = [&](int i, int j) {
      return a * turn(i + 1, j) + b * turn(i, j + 1) + q20 * turn(i + 2, j) + q11 * turn(i + 1, j + 1) +
             q02 * turn(i, j + 2) + q30 * turn(i + 3, j) + q21 * turn(i + 2, j + 1) + q12 * turn(i + 1, j + 2) +
             q03 * turn(i, j + 3);
    };
    const double lls = with_ll(1, 0), llt = with_ll(0, 1), llss = with_ll(2, 0), llst = with_ll(1, 1);
    const double lltt = with_ll(0, 2);
    const double lq = with_lq(0, 0), lqs = with_lq(1, 0), lqt = with_lq(0, 1);
    const double qq = ll20 * turn(2, 0) + ll11 * turn(1, 1) + ll02 * turn(0, 2) +
                      2.0 * (q30 * turn(3, 0) + q21 * turn(2, 1) + q12 * turn(1, 2) + q03 * turn(0, 3)) +
                      A * A * turn(4, 0) + 4.0 * A * B * turn(3, 1) + (2.0 * A * C + 4.0 * B * B) * turn(2, 2) +
                      4.0 * B * C * turn(1, 3) + C * C * turn(0, 4);
    const double x = f.x[l], y = f.y[l], depth = f.depth[l], amplitude = density[l] * f.thickness[l];
    const double scale = depth * depth * f.m_zz[l], per_m = 1.0 / f.m_zz[l];

    out[0][l] = f.thickness[l] * (pull(0, 0) + ll10 * pull(1, 0) + ll01 * pull(0, 1) + A * pull(2, 0) +
                                  2.0 * B * pull(1, 1) + C * pull(0, 2));

    const double moved = -2.0 * amplitude * depth;
    const double rz = -moved * (lq + qq);
    const double rx = moved * (lls + lqs) * ifx + x * rz, ry = moved * (llt + lqt) * ify + y * rz;
    out[1][l] = f.K[0][l] * rx + f.K[1][l] * ry + f.K[2][l] * rz;
    out[2][l] = f.K[1][l] * rx + f.K[3][l] * ry + f.K[4][l] * rz;
    out[3][l] = f.K[2][l] * rx + f.K[4][l] * ry + f.K[5][l] * rz;

    const double each = amplitude * per_m;
    const double xx = each * ifx * ifx * (scale * llss - 0.5 * pull(2, 0));
    const double xy = each * ifx * ify * (scale * llst - 0.5 * pull(1, 1));
    const double xz = each * ifx * (-scale * lqs - 0.5 * pull(1, 0));
    const double yy = each * ify * ify * (scale * lltt - 0.5 * pull(0, 2));
    const double yz = each * ify * (-scale * lqt - 0.5 * pull(0, 1));
    const double zz = each * (scale * qq - 0.5 * pull(0, 0));
    out[4][l] = xx + 2.0 * x * xz + x * x * zz;
    out[5][l] = 2.0 * (xy + x * yz + y * xz + x * y * zz);
    out[6][l] = 2.0 * (xz + x * zz);
    out[7][l] = yy + 2.0 * y * yz + y * y * zz;
    out[8][l] = 2.0 * (yz + y * zz);
    out[9][l] = zz;
    if (!kCamera) continue;

    // The gradient b to the offset (s, t) at a fixed Gaussian: sums of b_s, b_s s, b_t and b_t t.
    const double ls = f.ls[l], lt = f.lt[l], lss = f.lss[l], ltt = f.ltt[l];
    const double twice = 2.0 * scale;
    const double bs = ls * span(0, 0) + lss * span(1, 0) - (a * pull(0, 0) + A * pull(1, 0) + B * pull(0, 1)) +
                      twice * (A * lls + B * llt - a * lq);
    const double bss = ls * span(1, 0) + lss * span(2, 0) - (a * pull(1, 0) + A * pull(2, 0) + B * pull(1, 1)) +
                       twice * (A * llss + B * llst - a * lqs);
    const double bt = lt * span(0, 0) + ltt * span(0, 1) - (b * pull(0, 0) + B * pull(1, 0) + C * pull(0, 1)) +
                      twice * (B * lls + C * llt - b * lq);
    const double btt = lt * span(0, 1) + ltt * span(0, 2) - (b * pull(0, 1) + B * pull(1, 1) + C * pull(0, 2)) +
                       twice * (B * llst + C * lltt - b * lqt);
    out[10][l] = -amplitude * (x * bs + bss * ifx);
    out[11][l] = -amplitude * (y * bt + btt * ify);
    out[12][l] = -amplitude * bs;
    out[13][l] = -amplitude * bt;
  }
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                   ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> camera, ffi::ResultBuffer<ffi::F32> output) {
  const int64_t total = density.element_count(), images = camera.element_count() / 4;
  float* out = output->typed_data();
  std::fill_n(out, output->element_count(), 0.0f);
  if (total == 0 || output->element_count() == 0) return ffi::Error::Success();
  const int64_t n = total / images, width = output->dimensions().back(), size = output->element_count() / images;
  const int64_t height = size / width, bands = pool.num_threads() > 1 ? radgs::SlabsPerImage(pool, images, height) : 1;
  const float *rho = density.typed_data(), *p = mean.typed_data(), *K = precision.typed_data();
  const float* k = camera.typed_data();
  // Gaussians [first, last) of one image.
  const auto prepare = [=](int64_t image, int64_t first, int64_t last, Footprint* footprints) {
    Forms forms;
    for (int64_t i = first; i < last; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, last - i));
      Prepare(p + 3 * i, K + 6 * i, count, k + 4 * image, height, width, footprints + (i - first), forms);
    }
  };
  constexpr int64_t kGrain = 256;
  if (bands == 1) {
    radgs::ParallelFor(pool, images, [&](int64_t image) {
      Footprint footprints[kLanes];
      for (int64_t i = image * n; i < (image + 1) * n; i += kLanes) {
        const int64_t last = std::min(i + kLanes, (image + 1) * n);
        prepare(image, i, last, footprints);
        for (int64_t j = i; j < last; ++j) {
          const Footprint& g = footprints[j - i];
          if (g.top <= g.bottom) Draw(g, rho[j] * g.thickness, {0, height - 1}, width, out + image * size);
        }
      }
    });
    return ffi::Error::Success();
  }

  // Bands of one image share their Gaussians; these are then prepared only once. Their rows lie apart from the rest, so
  // that a band can skip quickly what it does not hold.
  struct Rows {
    int32_t top, bottom;
  };
  const std::unique_ptr<Footprint[]> footprints(new (std::nothrow) Footprint[total]);
  const std::unique_ptr<Rows[]> rows(new (std::nothrow) Rows[total]);
  if (!footprints || !rows) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "splat: no memory for the footprints");
  }
  const int64_t blocks = (n + kGrain - 1) / kGrain;
  radgs::ParallelFor(pool, images * blocks, [&](int64_t block) {
    const int64_t image = block / blocks, first = image * n + block % blocks * kGrain;
    const int64_t last = std::min(first + kGrain, (image + 1) * n);
    prepare(image, first, last, footprints.get() + first);
    for (int64_t i = first; i < last; ++i) rows[i] = {footprints[i].top, footprints[i].bottom};
  });
  radgs::ParallelFor(pool, images * bands, [&](int64_t block) {
    const int64_t image = block / bands, slab = block % bands;
    const Interval band = {slab * height / bands, (slab + 1) * height / bands - 1};
    int64_t held[kGrain];
    for (int64_t first = image * n; first < (image + 1) * n; first += kGrain) {
      int count = 0;
      for (int64_t i = first; i < std::min(first + kGrain, (image + 1) * n); ++i) {
        held[count] = i;
        count += (rows[i].top <= rows[i].bottom) & (rows[i].top <= band.last) & (rows[i].bottom >= band.first);
      }
      for (int j = 0; j < count; ++j) {
        const Footprint& g = footprints[held[j]];
        Draw(g, rho[held[j]] * g.thickness, band, width, out + image * size);
      }
    }
  });
  return ffi::Error::Success();
}

// The gradients to a cloud and, one result more, to the camera from each of its Gaussians.
template <bool kCamera, typename... ToCamera>
ffi::Error Backward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> density, ffi::Buffer<ffi::F32> mean,
                    ffi::Buffer<ffi::F32> precision, ffi::Buffer<ffi::F32> camera, ffi::Buffer<ffi::F32> cotangent,
                    ffi::ResultBuffer<ffi::F32> to_density, ffi::ResultBuffer<ffi::F32> to_mean,
                    ffi::ResultBuffer<ffi::F32> to_precision, ToCamera... to_camera) {
  static_assert(sizeof...(to_camera) == kCamera);
  constexpr int kSums = kMoments<kCamera>;
  const int64_t total = density.element_count();
  if (total == 0) return ffi::Error::Success();
  const int64_t images = camera.element_count() / 4, n = total / images, size = cotangent.element_count() / images;
  const int64_t width = cotangent.dimensions().back(), height = width == 0 ? 0 : size / width;
  const float *rho = density.typed_data(), *p = mean.typed_data(), *K = precision.typed_data();
  const float* k = camera.typed_data();
  const float* c = cotangent.typed_data();
  float *drho = to_density->typed_data(), *dp = to_mean->typed_data(), *dK = to_precision->typed_data();
  float* const dks[] = {to_camera->typed_data()..., nullptr};
  constexpr int64_t kGrain = 32;
  const int64_t blocks = (n + kGrain - 1) / kGrain;
  radgs::ParallelFor(pool, images * blocks, [&](int64_t block) {
    const int64_t image = block / blocks, start = image * n + block % blocks * kGrain;
    const int64_t end = std::min(start + kGrain, (image + 1) * n);
    for (int64_t first = start; first < end; first += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
      Footprint footprints[kLanes];
      Forms forms;
      Prepare(p + 3 * first, K + 6 * first, count, k + 4 * image, height, width, footprints, forms);
      Lanes moments[kLanes][kSums];
      for (int l = 0; l < kLanes; ++l) {
        if (l < count && footprints[l].top <= footprints[l].bottom) {
          Gather<kCamera>(footprints[l], height, width, c + image * size, moments[l]);
        } else {
          std::fill_n(moments[l], kSums, Lanes{});
        }
      }
      alignas(32) double totals[kSums][kLanes];
      for (int i = 0; i < kSums; ++i) {
        const Lanes sums = SumsOfLanes(&moments[0][i], kSums);
        for (int l = 0; l < kLanes; ++l) totals[i][l] = sums[l];
      }
      alignas(32) float rhos[kLanes] = {}, out[14][kLanes];
      std::copy_n(rho + first, count, rhos);
      Gradients<kCamera>(forms, totals, rhos, k + 4 * image, out);
      for (int l = 0; l < count; ++l) {
        const int64_t own = first + l;
        const bool drawn = footprints[l].top <= footprints[l].bottom;
        const auto result = [&](int i) { return drawn ? out[i][l] : 0.0f; };
        drho[own] = result(0);
        for (int i = 0; i < 3; ++i) dp[3 * own + i] = result(1 + i);
        for (int i = 0; i < 6; ++i) dK[6 * own + i] = result(4 + i);
        for (int i = 0; kCamera && i < 4; ++i) dks[0][4 * own + i] = result(10 + i);
      }
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

inline auto BindBackward() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsSplatBackward, (Backward<true, ffi::ResultBuffer<ffi::F32>>),
                              BindBackward().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(RadgsSplatBackwardOfCloud, Backward<false>, BindBackward());
