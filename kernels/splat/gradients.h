// The gradients of `splat` to kLanes Gaussians from sums over their pixels. Only splat.cc includes it.
#ifndef RADGS_KERNELS_SPLAT_GRADIENTS_H_
#define RADGS_KERNELS_SPLAT_GRADIENTS_H_

#include "footprint.h"

namespace {

// The gradients are linear in moments, sums over pixels of a cotangent times s^i t^j. With h = c sqrt(lambda / alpha)
// for the image's cotangent c: `turn` of h w'(q) / alpha^2 (i + j <= 4), `pull` of h w / alpha and `span` of
// h w / lambda (i + j <= 2), which only the gradient to the camera needs.
constexpr int kTurn = 15, kPull = 6, kSpan = 6;
template <bool kCamera>
constexpr int kMoments = kTurn + kPull + (kCamera ? kSpan : 0);

// Place of s^i t^j among the moments with i + j <= degree.
constexpr int At(int i, int j, int degree) { return i * (degree + 1) - i * (i - 1) / 2 + j; }

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

}  // namespace

#endif  // RADGS_KERNELS_SPLAT_GRADIENTS_H_
