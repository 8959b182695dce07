// Pages as an int8 host has them; page_tier/codec.py is the specification.
#pragma once

#include <cstdint>

#include "psa_abi.h"

namespace psa {

// Stateless; any thread may call. A page is keys and values [heads, page_size, head_dim] in `dtype`.
class PageCodec {
 public:
  explicit PageCodec(const PsaTierCreateArgs& a)
      : heads_(a.num_kv_heads), page_size_(a.page_size), head_dim_(a.head_dim), dtype_(a.dtype) {}

  void encode(const void* k, const void* v, void* record) const;
  void decode(const void* record, void* k, void* v) const;

 private:
  template <class T>
  void encode_as(const T* k, const T* v, int8_t* record) const;
  template <class T>
  void decode_as(const int8_t* record, T* k, T* v) const;

  int64_t half() const { return (int64_t)heads_ * page_size_ * head_dim_; }

  int heads_, page_size_, head_dim_, dtype_;
};

}  // namespace psa
