// The tokens that are attended together: where their rows lie, and room for what comes of them.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "simd.h"

namespace psa {

// Pages are attended in blocks of about this many tokens, to spread the cost of a softmax step.
constexpr int BLOCK_TOKENS = 64;
// Distance in tokens between what is attended and what is brought to a cache, first keys, then
// values, then the next block's keys. A row takes about a tenth of the latency of memory.
constexpr int AHEAD_ONE_HEAD = 40, AHEAD_ALL_HEADS = 8;

// Where the rows of a page begin, for the first KV head.
template <class T>
struct PageRows {
  const T *k, *v;
  int tokens;
};

// K and V rows, for the first KV head, of the tokens that are attended together, in the order in
// which they are read: a row of each page in turn. Pages lie apart, and several places of memory
// are read at once faster than one after the other. place: where a token would be if those of a
// page followed each other.
template <class T>
struct Block {
  const T **k, **v;
  int16_t* place;
  int tokens;
  int pages;        // of the block
  int page_tokens;  // of each of them; 0 if they differ

  // k_step, v_step: strides from one token to the next
  void fill(const PageRows<T>* from, int count, int64_t k_step, int64_t v_step) {
    int longest = 0, total = 0;
    for (int i = 0; i < count; i++) {
      longest = std::max(longest, from[i].tokens);
      total += from[i].tokens;
    }
    if (total == longest * count)
      fill_even(from, count, longest, k_step, v_step);
    else
      fill_ragged(from, count, longest, k_step, v_step);
    tokens = total;
  }

 private:
  void fill_even(const PageRows<T>* from, int count, int each, int64_t k_step, int64_t v_step) {
    for (int i = 0; i < count; i++) {
      const T *k_row = from[i].k, *v_row = from[i].v;
      for (int t = i; t < count * each; t += count, k_row += k_step, v_row += v_step) {
        k[t] = k_row;
        v[t] = v_row;
      }
    }
    if (pages == count && page_tokens == each) return;
    pages = count;
    page_tokens = each;
    for (int t = 0, next = 0; t < each; t++)
      for (int i = 0; i < count; i++) place[next++] = (int16_t)(i * each + t);
  }
  void fill_ragged(const PageRows<T>* from, int count, int longest, int64_t k_step,
                   int64_t v_step) {
    pages = count;
    page_tokens = 0;
    for (int t = 0, next = 0; t < longest; t++)
      for (int i = 0, first = 0; i < count; first += from[i++].tokens)
        if (t < from[i].tokens) {
          k[next] = from[i].k + t * k_step;
          v[next] = from[i].v + t * v_step;
          place[next++] = (int16_t)(first + t);
        }
  }
};

inline int padded(int tokens) { return (tokens + LANES - 1) / LANES * LANES; }

// Row pointers of a block and results of its tokens, in the order of reading, for `heads` query
// heads in all.
template <class T>
struct BlockSpace {
  Block<T> now, ahead;     // ahead: the block that is likely to follow
  int64_t k_head, v_head;  // strides from one KV head to the next
  float *logits, *weights;
  int pitch;
  // How far ahead of what one KV head attends rows are brought: `lead` tokens when the block ends,
  // `extra` more when it begins. Whoever has brought so many of them meanwhile has kept memory busy
  // between two blocks, and the block asks for the fewer.
  int lead = AHEAD_ONE_HEAD, extra = 0;

  int ahead_of(int done) const {
    constexpr int steps = 2 * BLOCK_TOKENS;  // of a block: its keys, its values
    return lead + std::max(0, extra * (steps - done) / steps);
  }

  static size_t bytes(int heads, int tokens) {
    return 4 * Scratch::need<const T*>(tokens) + 2 * Scratch::need<int16_t>(tokens) +
           2 * Scratch::need<float>((size_t)heads * pitch_of(tokens));
  }
  void take(Scratch& s, int heads, int tokens) {
    pitch = pitch_of(tokens);
    for (Block<T>* b : {&now, &ahead}) {
      b->k = s.take<const T*>(tokens);
      b->v = s.take<const T*>(tokens);
      b->place = s.take<int16_t>(tokens);
      b->tokens = b->pages = b->page_tokens = 0;
    }
    logits = s.take<float>((size_t)heads * pitch);
    weights = s.take<float>((size_t)heads * pitch);
  }
  static int pitch_of(int tokens) { return padded(tokens) + 16; }
};

// Has the addresses of a block translated. A prefetch that has to wait for a translation keeps the
// arithmetic behind it waiting, too; side by side such prefetches wait together. The rows named are
// the first ones of all pages of memory where a head's rows follow each other.
template <class T>
inline void translate(const Block<T>& b, int dim) {
  int rows = 1;
  while (2 * rows * dim * (int)sizeof(T) <= 4096) rows *= 2;
  // Pages of one length have their rows of a place side by side. Of others some are left out.
  const int side = b.page_tokens ? b.pages : 1;
  for (int first = 0; first < b.tokens; first += rows * side)
    for (int t = first; t < first + side; t++) {
      prefetch_l2(b.k[t]);
      prefetch_l2(b.v[t]);
    }
}

}  // namespace psa
