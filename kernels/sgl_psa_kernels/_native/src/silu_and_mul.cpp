// SiLU of the first half of each row times the second half.
#include "store.h"
#include "vecmath.h"

namespace psa {
namespace {

// x / (1 + exp(-x)), with the exponential of a number below 0: it cannot overflow.
inline F silu(F x) {
  const F e = exp(-abs(x));
  return x * ((x < 0.0f ? e : set1(1.0f)) / (1.0f + e));
}

template <class T>
void activate(const PsaSiluAndMulArgs& a, int64_t row) {
  const T* gate = static_cast<const T*>(a.x) + row * a.x_row_stride;
  const T* up = gate + a.dim;
  T* out = static_cast<T*>(a.out) + row * a.dim;
  each_vector(a.dim, [&](int64_t i, auto load, auto store) {
    store(out + i, silu(load(gate + i)) * load(up + i));
  });
}

}  // namespace
}  // namespace psa

extern "C" int psa_silu_and_mul(PsaSiluAndMulArgs* args) {
  using namespace psa;
  const PsaSiluAndMulArgs& a = *args;
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for num_threads(a.num_threads) \
    schedule(static) if (a.num_threads > 1 && a.rows >= 16)
    for (int64_t row = 0; row < a.rows; row++) activate<T>(a, row);
  });
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
