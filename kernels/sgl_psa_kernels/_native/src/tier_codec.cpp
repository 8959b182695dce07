// Keys share an exponent per channel of a page, values one per token.
#include "tier_codec.h"

#include <algorithm>
#include <type_traits>

#include "elem.h"

namespace psa {
namespace {

constexpr int NOT_FINITE = -128;

// Exponents that a block may have; beyond the highest, elements saturate.
template <class T>
constexpr int LOWEST = std::is_same_v<T, fp16> ? -24 : -119;
template <class T>
constexpr int HIGHEST = std::is_same_v<T, fp16> ? 9 : 121;

inline I bits_of(F x) { return (I)x & 0x7fffffff; }
inline I larger(I a, I b) { return a > b ? a : b; }
inline I smaller(I a, I b) { return a < b ? a : b; }
inline int largest_lane(I x) {
  int largest = 0;
  for (int i = 0; i < LANES; i++) largest = std::max(largest, (int)x[i]);
  return largest;
}

// Of blocks by the bits of their largest magnitude m, which are those of a NaN if there is one: the
// smallest exponent under which m rounds to at most 127. The sum carries into the exponent from
// 127.5 / 128 of the next power of two on.
template <class T>
inline I exponents_of(I m) {
  const I e = smaller(larger(((m + 0x10000) >> 23) - 133, set1i(LOWEST<T>)), set1i(HIGHEST<T>));
  return m < 0x7f800000 ? e : set1i(NOT_FINITE);
}
inline F power_of(I e) { return (F)((e + 127) << 23); }

inline I load_bytes(const int8_t* from) {
  return (I)(widen_bytes(reinterpret_cast<const uint8_t*>(from)) << 24) >> 24;
}

// Elements of x in blocks of exponents e; 0 in those that are not finite.
inline I elements_of(F x, I e) {
  const I finite = e != NOT_FINITE;
  const F scaled = (F)((I)x & finite) * power_of(-e & finite);
  return __builtin_convertvector(round_small(min(max(scaled, set1(-127)), set1(127))), I);
}

// Conversions of what T holds exactly.
inline void store_exact(float* to, F x) { storeu(to, x); }
inline void store_exact(bf16* to, F x) { storeu(to, __builtin_convertvector((U)x >> 16, H)); }
inline void store_exact(fp16* to, F x) {
  const U magnitude = (U)bits_of(x), sign = ((U)x & 0x80000000u) >> 16;
  const U normal = (magnitude - 0x38000000u) >> 13;
  const U subnormal = (U)__builtin_convertvector(abs(x) * 0x1p24f, I);
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U nan = 0x7e00u - U{};
  storeu(to, __builtin_convertvector((magnitude > 0x7f800000u ? nan : finite) | sign, H));
}

// What the elements of blocks of exponent e are multiplied by: NaN where they were not finite.
inline F scale_of(I e) { return e != NOT_FINITE ? power_of(e) : (F)set1i(0x7fc00000); }

template <class T>
inline void restore(const int8_t* from, F scale, T* to) {
  store_exact(to, __builtin_convertvector(load_bytes(from), F) * scale);
}

}  // namespace

template <class T>
void PageCodec::encode_as(const T* k, const T* v, int8_t* record) const {
  int8_t *keys = record, *values = record + half();
  int8_t *key_exponents = record + 2 * half(), *value_exponents = key_exponents + heads_ * head_dim_;
  for (int h = 0; h < heads_; h++) {
    for (int d = 0; d < head_dim_; d += LANES) {
      I largest{};
      for (int t = 0; t < page_size_; t++)
        largest = larger(largest, bits_of(load(k + t * head_dim_ + d)));
      const I e = exponents_of<T>(largest);
      store_bytes(key_exponents + d, e);
      for (int t = 0; t < page_size_; t++) {
        const int i = t * head_dim_ + d;
        store_bytes(keys + i, elements_of(load(k + i), e));
      }
    }
    for (int t = 0; t < page_size_; t++) {
      const T* row = v + t * head_dim_;
      I largest{};
      for (int d = 0; d < head_dim_; d += LANES) largest = larger(largest, bits_of(load(row + d)));
      const I e = exponents_of<T>(set1i(largest_lane(largest)));
      value_exponents[t] = (int8_t)e[0];
      for (int d = 0; d < head_dim_; d += LANES)
        store_bytes(values + t * head_dim_ + d, elements_of(load(row + d), e));
    }
    const int64_t head = (int64_t)page_size_ * head_dim_;
    k += head, v += head, keys += head, values += head;
    key_exponents += head_dim_, value_exponents += page_size_;
  }
  std::memset(value_exponents, 0, -(value_exponents - record) & 63);
}

template <class T>
void PageCodec::decode_as(const int8_t* record, T* k, T* v) const {
  const int8_t *keys = record, *values = record + half();
  const int8_t* key_exponents = record + 2 * half();
  const int8_t* value_exponents = key_exponents + heads_ * head_dim_;
  for (int h = 0; h < heads_; h++) {
    for (int d = 0; d < head_dim_; d += LANES) {
      const F scale = scale_of(load_bytes(key_exponents + d));
      for (int i = d; i < page_size_ * head_dim_; i += head_dim_) restore(keys + i, scale, k + i);
    }
    for (int t = 0; t < page_size_; t++) {
      const F scale = scale_of(set1i(value_exponents[t]));
      for (int i = t * head_dim_; i < (t + 1) * head_dim_; i += LANES)
        restore(values + i, scale, v + i);
    }
    const int64_t head = (int64_t)page_size_ * head_dim_;
    k += head, v += head, keys += head, values += head;
    key_exponents += head_dim_, value_exponents += page_size_;
  }
}

void PageCodec::encode(const void* k, const void* v, void* record) const {
  with_dtype(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    encode_as(static_cast<const T*>(k), static_cast<const T*>(v), static_cast<int8_t*>(record));
  });
}

void PageCodec::decode(const void* record, void* k, void* v) const {
  with_dtype(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    decode_as(static_cast<const int8_t*>(record), static_cast<T*>(k), static_cast<T*>(v));
  });
}

}  // namespace psa
