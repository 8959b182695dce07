// Estimated log masses of the pages of one (row, KV head) that are not attended yet.
#pragma once

#include "scratch.h"
#include "vecmath.h"

namespace psa {

// log_mass[g][page] with -inf for every page that left the set; rows padded with -inf to LANES.
struct Estimates {
  float* log_mass;
  int group, pages, pitch;

  static int pitch_of(int pages) { return (pages + LANES - 1) / LANES * LANES; }
  static size_t bytes(int group, int pages) {
    return Scratch::need<float>((size_t)group * pitch_of(pages));
  }
  void take(Scratch& s, int g, int n) {
    group = g;
    pages = n;
    pitch = pitch_of(n);
    log_mass = s.take<float>((size_t)group * pitch);
  }
  float* head(int g) { return log_mass + (size_t)g * pitch; }
  const float* head(int g) const { return log_mass + (size_t)g * pitch; }

  // True if a page is stale: the estimate of any head is +inf or NaN.
  bool copy_from(const float* rows, int64_t row_stride) {
    I known = set1i(-1);
    for (int g = 0; g < group; g++) {
      const float* from = rows + g * row_stride;
      float* to = head(g);
      const int whole = pages / LANES * LANES;
      for (int p = 0; p < whole; p += LANES) {
        const F x = loadu<F>(from + p);
        known &= x < set1(INF);
        storeu(to + p, x);
      }
      for (int p = whole; p < pitch; p++) to[p] = p < pages ? from[p] : -INF;
      if (whole < pages) known &= loadu<F>(to + whole) < set1(INF);
    }
    return any(~known);
  }
  // A stale page has no estimate for any head.
  void forget(int page) {
    for (int g = 0; g < group; g++) head(g)[page] = INF;
  }
  bool is_stale(int page) const {
    bool known = true;
    for (int g = 0; g < group; g++) known &= head(g)[page] < INF;
    return !known;
  }
};

// Log-sum-exp of one head's estimates. Follows removals by subtraction and starts anew before the
// cancellation could be felt.
struct LeftMass {
  float base;           // sum is in units of exp(base)
  double sum, started;  // now, and when it was last computed from all pages

  float log_sum() const { return sum > 0 ? base + (float)std::log(sum) : -INF; }

  void compute(const Estimates& e, int g) {
    const float* x = e.head(g);
    F top = set1(-INF);
    for (int p = 0; p < e.pitch; p += LANES) top = max(top, loadu<F>(x + p));
    base = hmax(top);
    sum = 0;
    if (base > -INF) {
      constexpr int BLOCK = 64 * LANES;  // bounds the rounding of the float partial sums
      for (int p = 0; p < e.pitch; p += BLOCK) {
        F part{};
        const int end = p + BLOCK < e.pitch ? p + BLOCK : e.pitch;
        for (int i = p; i < end; i += LANES) part += exp(loadu<F>(x + i) - base);
        sum += hsum(part);
      }
    }
    started = sum;
  }
  // Pages with these estimates, [padded to LANES with -inf], have left the set.
  void subtract(const float* estimates, int count) {
    F part{};
    if (!(base > -INF)) return;
    for (int p = 0; p < count; p += LANES) part += exp(loadu<F>(estimates + p) - base);
    sum -= hsum(part);
  }
  void refresh(const Estimates& e, int g) {
    if (sum < 0.01 * started) compute(e, g);
  }
};

}  // namespace psa
