// Key sketches of new keys.
#include <algorithm>
#include <vector>

#include "elem.h"
#include "rotation.h"
#include "scratch.h"
#include "sketch_layout.h"

namespace psa {
namespace {

struct Affine {
  float scale, zero;
};

// The stored pair; what the codes are computed with is its value after rounding to half.
inline Affine store_affine(uint16_t* pair, float scale, float zero) {
  pair[0] = to_fp16(scale);
  pair[1] = to_fp16(zero);
  return {from_fp16(pair[0]), from_fp16(pair[1])};
}

inline Affine fit(const float* x, int dim, int bits, uint16_t* pair) {
  if (bits == 1) {
    F sum{}, deviation{};
    for (int d = 0; d < dim; d += LANES) sum += loadu<F>(x + d);
    const float mean = hsum(sum) / dim;
    for (int d = 0; d < dim; d += LANES) deviation += abs(loadu<F>(x + d) - mean);
    const float mad = hsum(deviation) / dim;
    return store_affine(pair, 2 * mad, mean - mad);
  }
  F low = loadu<F>(x), high = low, finite{};
  for (int d = 0; d < dim; d += LANES) {
    const F v = loadu<F>(x + d);
    low = min(low, v);
    high = max(high, v);
    finite += v - v;
  }
  // The comparisons skip NaN; this sum is 0 if every element is finite, else NaN.
  const float lowest = -hmax(-low) + hsum(finite), highest = hmax(high);
  return store_affine(pair, (highest - lowest) / (float)((1 << bits) - 1), lowest);
}

// codes[d] in 0 .. 2^bits - 1
inline void encode(const float* x, int dim, int bits, Affine a, int32_t* codes) {
  const float top = (float)((1 << bits) - 1);
  const float scale = a.scale > 0 ? a.scale : INF;  // all elements equal: code 0
  for (int d = 0; d < dim; d += LANES) {
    const F v = loadu<F>(x + d);
    I code;
    if (bits == 1) {
      code = (v > set1(a.zero + 0.5f * a.scale)) & 1;
    } else {
      F position = (v - a.zero) / scale;
      position = position > 0.0f ? position : F{};  // NaN becomes 0
      position = round_small(min(position, set1(top)));
      code = __builtin_convertvector(position, I);
    }
    storeu(codes + d, code);
  }
}

// codes[d] in 0 .. 2^bits - 1 of a rotated key, and its scale.
inline void encode_rotated(const float* x, int dim, int bits, uint16_t* scale, int32_t* codes) {
  // Least squared error of uniform levels for normally distributed elements, in deviations.
  const float unit = bits == 1 ? 1.5958f : bits == 2 ? 0.9957f : 0.3352f;
  F squares{};
  for (int d = 0; d < dim; d += LANES) squares += loadu<F>(x + d) * loadu<F>(x + d);
  const float square = hsum(squares), step = unit * std::sqrt(square / dim);
  const float inverse = step > 0 ? 1 / step : 0.0f, offset = (float)(1 << (bits - 1));
  const float top = (float)((1 << bits) - 1), middle = 0.5f * top;
  F along{};
  for (int d = 0; d < dim; d += LANES) {
    const F v = loadu<F>(x + d);
    F position = v * inverse + offset;
    position = position > 0.0f ? position : F{};  // NaN becomes 0
    const I code = __builtin_convertvector(min(position, set1(top)), I);
    along += (__builtin_convertvector(code, F) - middle) * v;
    storeu(codes + d, code);
  }
  *scale = square == 0 ? 0 : to_fp16(square / hsum(along));
  if ((*scale & 0x7c00) == 0x7c00) *scale = 0x7e00;  // a scale that is no number: NaN
}

// The codes of a key to its columns; `codes` is overwritten.
inline void store_codes(const SketchLayout& layout, int bits, int offset, int32_t* codes,
                        uint8_t* page) {
  const int width = layout.width;
  for (int p = 1; p < 8 / bits; p++)
    for (int j = 0; j < width; j++) codes[j] |= codes[p * width + j] << (p * bits);
  for (int c = 0; c < layout.columns; c++) {
    uint8_t bytes[4];
    const int count = layout.column_bytes(c);
    for (int i = 0; i < count; i++) bytes[i] = (uint8_t)codes[4 * c + i];
    std::memcpy(page + layout.place(offset, c), bytes, count);
  }
}

// The places of the codes and the affine values of one kind of sketch.
struct Target {
  SketchLayout layout;
  int bits;
  uint8_t* codes;
  uint16_t* affine;
};

template <class T>
void write_key(const PsaSketchWriteArgs& a, const std::vector<Target>& targets, int64_t i,
               int head, float* x, int32_t* codes) {
  const int D = a.head_dim;
  const int64_t slot = a.slots[i], row = a.in_order ? i : slot;
  const T* key = static_cast<const T*>(a.k) + row * a.k_token_stride + head * a.k_head_stride;
  const int64_t page = slot / a.page_size * a.num_kv_heads + head;
  const int offset = (int)(slot % a.page_size);
  const int64_t at = page * a.page_size + offset;
  for (int d = 0; d < D; d += LANES) {
    const F v = load(key + d);
    storeu(x + d, a.signs ? v * loadu<F>(a.signs + d) : v);
  }
  if (a.signs) hadamard(x, D);
  for (const Target& to : targets) {
    if (a.signs)
      encode_rotated(x, D, to.bits, to.affine + at, codes);
    else
      encode(x, D, to.bits, fit(x, D, to.bits, to.affine + at * 2), codes);
    store_codes(to.layout, to.bits, offset, codes, to.codes + page * to.layout.page_bytes());
  }
}

// scorers/watermark.py, slot by slot.
void advance(const PsaSketchWriteArgs& a) {
  for (int64_t i = 0; i < a.count; i++) {
    int32_t& mark = a.watermark[a.slots[i] / a.page_size];
    const int32_t offset = (int32_t)(a.slots[i] % a.page_size);
    if (offset == 0 || mark >= offset) mark = offset + 1;
  }
}

}  // namespace
}  // namespace psa

extern "C" int psa_sketch_write(PsaSketchWriteArgs* args) {
  using namespace psa;
  const PsaSketchWriteArgs& a = *args;
  for (int64_t i = 0; i < a.count; i++)
    if (a.slots[i] < 0 || a.slots[i] >= a.num_slots) {
      args->error_index = i;
      return PSA_BAD_SLOT;
    }
  const auto target = [&](int bits, uint8_t* codes, uint16_t* affine) {
    return Target{SketchLayout(a.page_size, a.head_dim, bits), bits, codes, affine};
  };
  std::vector<Target> targets = {target(a.bits, a.codes, a.affine)};
  if (a.second_codes) targets.push_back(target(a.second_bits, a.second_codes, a.second_affine));
  const bool known = with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel num_threads(a.num_threads) if (a.num_threads > 1 && a.count >= 16)
    {
      static thread_local Scratch scratch;
      scratch.reset(Scratch::need<float>(a.head_dim) + Scratch::need<int32_t>(a.head_dim));
      float* x = scratch.take<float>(a.head_dim);
      int32_t* codes = scratch.take<int32_t>(a.head_dim);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a.count; i++)
        for (int h = 0; h < a.num_kv_heads; h++)
          write_key<T>(a, targets, i, h, x, codes);
    }
  });
  if (known && a.watermark) advance(a);
  return known ? PSA_OK : PSA_BAD_DTYPE;
}
