// RMS normalisation of rows, optionally of the sum with a residual that is returned too.
#include "store.h"

namespace psa {
namespace {

template <class T>
void normalise(const PsaRmsNormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_row_stride;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_row_stride;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * a.dim;
  T* sum = static_cast<T*>(a.residual_out) + row * a.dim;
  F squares{};
  each_vector(a.dim, [&](int64_t i, auto load, auto store) {
    F v = load(x + i);
    if (a.residual) {
      v += load(residual + i);
      store(sum + i, v);
    }
    squares += v * v;
  });
  const float scale = 1.0f / std::sqrt(hsum(squares) / (float)a.dim + a.eps);
  each_vector(a.dim, [&](int64_t i, auto load, auto store) {
    // The sum again in float32: its rounded copy is for the residual only.
    const F v = a.residual ? load(x + i) + load(residual + i) : load(x + i);
    store(out + i, v * scale * load(weight + i));
  });
}

}  // namespace
}  // namespace psa

extern "C" int psa_rms_norm(PsaRmsNormArgs* args) {
  using namespace psa;
  const PsaRmsNormArgs& a = *args;
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(a.num_threads) \
    schedule(static) if (a.num_threads > 1 && a.rows >= 16)
    for (int64_t row = 0; row < a.rows; row++) normalise<T>(a, row);
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
