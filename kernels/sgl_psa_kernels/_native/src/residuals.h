// Exact minus estimated log masses of the pages attended by one query head.
#pragma once

#include <algorithm>
#include <cmath>

namespace psa {

struct Residuals {
  double sum, square;
  int count;

  void clear() { *this = {}; }
  void add(const Residuals& other) {
    sum += other.sum;
    square += other.square;
    count += other.count;
  }
  // An estimate of +-inf or NaN is none: its page does not count.
  void add(float exact, float estimate) {
    if (!std::isfinite(estimate)) return;
    const double r = (double)exact - estimate;
    sum += r;
    square += r * r;
    count++;
  }
  // mean + std * deviation, at least floor
  float correction(float std_multiple, float floor) const {
    const double n = std::max(count, 1), mean = sum / n;
    const double variance = std::max(0.0, square / n - mean * mean);
    const float kappa = (float)(mean + std_multiple * std::sqrt(variance));
    return kappa < floor ? floor : kappa;
  }
  void write(float* to) const {
    to[0] = (float)count;
    to[1] = (float)sum;
    to[2] = (float)square;
  }
};

}  // namespace psa
