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

#include "footprint.h"
#include "gradients.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

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

constexpr float kTiny = 1e-30f;  // lower bound of alpha, which rounding could make negative for an extreme Gaussian
constexpr float kFadeSlope = 1.0f / (radgs::kQMax - radgs::kQFade);
// The exponent is x = kHalfLog2E q.
constexpr float kXMax = static_cast<float>(kHalfLog2E * radgs::kQMax);
constexpr float kFadeX = static_cast<float>(kFadeSlope / kHalfLog2E);

// Rows processed at a time. A pixel's long chain of dependent operations is split into several loops over these rows, because
// the processor overlaps more iterations of a short loop body.
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
  // that a band skips Gaussians outside it quickly.
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
