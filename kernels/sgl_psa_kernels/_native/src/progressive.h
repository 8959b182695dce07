// The progressive loop for one (row, KV head): forced pages, then groups until the rule stops.
#pragma once

#include "estimates.h"
#include "pool.h"
#include "ranking.h"
#include "residuals.h"

namespace psa {

// As AHEAD_ONE_HEAD, when a block of the loop ends; and keys of the next block that are brought at
// each of a few places between two blocks, where memory would wait for the rule. More at once would
// find no buffers free, and be dropped.
constexpr int AHEAD_LOOP = 48, AT_ONCE = 4;

template <class T, class Pool = RowPool<T>>
class Progressive {
 public:
  Progressive(const PsaDecodeArgs& a, Pool& pool, int row, int kv_head, Scratch& scratch)
      : a_(a),
        pool_(pool),
        row_(row),
        head_(kv_head),
        group_(a.rows.num_qo_heads / a.rows.num_kv_heads),
        n_(num_pages(a.rows, row)),
        dim_(a.rows.head_dim),
        step_(block_pages(a.rows)),
        step_pitch_(padded(step_)),
        mode_(a.mode[row]),
        attend_block_(attend_block_for<T>(dim_, 1)),
        attended_(attended_of(a, row, kv_head)) {
    const int tokens = step_ * a.rows.page_size;
    scratch.reset(HeadState::bytes(group_, dim_) + Estimates::bytes(group_, n_) +
                  BlockSpace<T>::bytes(group_, tokens) + Ranking::bytes(n_) +
                  Scratch::need<int>(n_) + 2 * Scratch::need<int>(step_) +
                  2 * Scratch::need<float>(group_ * step_pitch_) +
                  3 * Scratch::need<float>(group_) + 2 * Scratch::need<Residuals>(group_) +
                  Scratch::need<LeftMass>(group_));
    st_.take(scratch, group_, dim_);
    left_.take(scratch, group_, n_);
    space_.take(scratch, group_, tokens);
    space_.k_head = space_.v_head = 0;
    space_.lead = AHEAD_LOOP;
    order_.take(scratch, n_);
    picked_ = scratch.take<int>(n_);
    then_ = scratch.take<int>(step_);
    filled_ = scratch.take<int>(step_);
    mass_ = scratch.take<float>(group_ * step_pitch_);
    estimate_ = scratch.take<float>(group_ * step_pitch_);
    total_ = scratch.take<float>(group_);
    kappa_ = scratch.take<float>(group_);
    bar_ = scratch.take<float>(group_);
    residuals_ = scratch.take<Residuals>(group_);
    earlier_ = scratch.take<Residuals>(group_);
    rest_ = scratch.take<LeftMass>(group_);
  }

  void run() {
    if (attended_) std::memset(attended_, 0, a_.rows.max_pages);
    st_.start(pool_.q(head_), a_.rows.q_head_stride, group_, dim_, a_.rows.sm_scale);
    const int64_t at = first_head();
    const bool stale = left_.copy_from(a_.log_mass + at * a_.rows.max_pages, a_.rows.max_pages);
    attend_forced(stale);
    if (pages_done_ < n_) {
      rank();
      if (mode_ == PSA_MARGINAL)
        marginal();
      else
        coverage();
    }
    for (int g = 0; g < group_; g++) {
      write_head<T>(a_, at + g, st_, g);
      earlier_[g].add(residuals_[g]);
      if (float* residuals = residuals_of(a_, at + g)) earlier_[g].write(residuals);
    }
    write_stats();
  }

 private:
  int64_t first_head() const { return (int64_t)row_ * a_.rows.num_qo_heads + head_ * group_; }

  // Attends pages in blocks and takes them out of the estimates; `then` are pages likely to follow.
  // brought: the first block is on its way to L2. compare: adds the residuals of the pages.
  void attend(const int* pages, int count, const int* then, int then_count, bool brought,
              bool compare) {
    if (!count) return;
    pool_.expect(pages, count, then, then_count);
    if constexpr (Pool::RESIDENT) {
      if (!foreseen(pages, std::min(step_, count))) fill(space_.now, pages, count);
      if (!brought) bring(0, AHEAD_LOOP);
    }
    const PageMass wanted{compare ? mass_ : nullptr, step_pitch_, a_.rows.page_size};
    for (int i = 0; i < count; i += step_) {
      const int end = std::min(i + step_, count);
      const int* next = end < count ? pages + end : then;
      const int next_count = std::min(step_, end < count ? count - end : then_count);
      pool_.need(pages + i, end - i, next, next_count);
      if constexpr (!Pool::RESIDENT) {
        fill(space_.now, pages + i, end - i);
        if (!brought && !i) bring(0, AHEAD_LOOP);
      }
      pool_.fill_next(space_.ahead, next, next_count, head_);
      space_.extra = std::max(0, asked_ - AHEAD_LOOP);
      attend_block_(st_, 1, group_, dim_, space_, wanted);
      pool_.done();
      tokens_done_ += space_.now.tokens;
      if constexpr (Pool::RESIDENT) {
        std::swap(space_.now, space_.ahead);
        asked_ = AHEAD_LOOP;
        ask();
      }
      leave(pages + i, end - i, compare);
      ask();
    }
    pages_done_ += count;
    num_filled_ = std::min(step_, then_count);
    std::copy(then, then + num_filled_, filled_);
  }
  // Whether space_.now has these pages already.
  bool foreseen(const int* pages, int count) const {
    return count == num_filled_ && std::equal(pages, pages + count, filled_);
  }
  void fill(Block<T>& b, const int* pages, int count) {
    pool_.fill(b, pages, std::min(step_, count), head_);
  }
  // Has keys first .. last of the block space_.now fetched.
  void bring(int first, int last) {
    const int bytes = dim_ * (int)sizeof(T);
    for (int t = first; t < std::min(last, space_.now.tokens); t++)
      bytes <= NEAR_ROW_BYTES ? prefetch_range<true>(space_.now.k[t], bytes)
                              : prefetch_range(space_.now.k[t], bytes);
  }
  // Has a few more keys of the block that is likely to follow fetched.
  void ask() {
    if (asked_ < AHEAD_LOOP || asked_ >= space_.now.tokens) return;
    bring(asked_, asked_ + AT_ONCE);
    asked_ += AT_ONCE;
  }

  // The pages of one block leave the estimates.
  void leave(const int* pages, int count, bool compare) {
    for (int g = 0; g < group_; g++) {
      if (mode_ == PSA_MARGINAL) {
        for (int i = 0; i < count; i++) left_.head(g)[pages[i]] = -INF;
        continue;
      }
      float *from = left_.head(g), *to = estimate_ + g * step_pitch_;
      for (int i = 0; i < count; i++) {
        to[i] = from[pages[i]];
        from[pages[i]] = -INF;
      }
      for (int i = count; i < padded(count); i++) to[i] = -INF;
      if (ranked_) rest_[g].subtract(to, count);
      const float* exact = mass_ + g * step_pitch_;
      for (int i = 0; compare && i < count; i++) residuals_[g].add(exact[i], to[i]);
    }
    if (attended_)
      for (int i = 0; i < count; i++) attended_[pages[i]] = 1;
  }

  // Of the residuals since they were cleared, never below the correction that the call began with.
  float correction(int g) const {
    const float kappa = residuals_[g].correction(a_.kappa_std[row_], a_.kappa_floor[row_]);
    return a_.kappa_start ? std::max(kappa, a_.kappa_start[first_head() + g]) : kappa;
  }
  float start(int g) const {
    if (!a_.kappa_start || mode_ != PSA_COVERAGE) return 0;
    return std::max(a_.kappa_start[first_head() + g], a_.kappa_floor[row_]);
  }
  // Starts the residuals of another group.
  void next_group() {
    for (int g = 0; g < group_; g++) {
      earlier_[g].add(residuals_[g]);
      residuals_[g].clear();
    }
  }

  void attend_forced(bool any_stale) {
    const int sink = std::min(a_.sink_pages, n_);
    const int recent = std::max(n_ - std::max(a_.recent_pages, 1), sink);
    forced_ = 0;
    for (int p = 0; p < sink; p++) picked_[forced_++] = p;
    for (int p = sink; any_stale && p < recent; p++)
      if (left_.is_stale(p)) picked_[forced_++] = p;
    for (int p = recent; p < n_; p++) picked_[forced_++] = p;
    for (int i = 0; any_stale && i < forced_; i++)
      if (left_.is_stale(picked_[i])) {
        stale_pages_++;
        left_.forget(picked_[i]);
      }
    const bool conservative = mode_ == PSA_CONSERVATIVE;
    const bool compare = conservative || (a_.residuals && mode_ == PSA_COVERAGE);
    for (int g = 0; g < group_; g++) residuals_[g].clear(), earlier_[g].clear();
    attend(picked_, forced_, nullptr, 0, false, compare);
    for (int g = 0; g < group_; g++) kappa_[g] = conservative ? correction(g) : start(g);
    scored_ = n_ - forced_;
  }

  void rank() {
    for (int g = 0; g < group_; g++) {
      rest_[g].compute(left_, g);
      total_[g] = log_add_exp(st_.log_mass(g), rest_[g].log_sum());
    }
    ranked_ = true;
    float* keys = order_.keys();
    for (int p = 0; p < n_; p += LANES) {
      F key = set1(Ranking::LOWEST);
      for (int g = 0; g < group_; g++) key = max(loadu<F>(left_.head(g) + p) - total_[g], key);
      storeu(keys + p, key);
    }
    for (int p = n_; p % LANES; p++) keys[p] = -INF;
    for (int i = 0; i < forced_; i++) keys[picked_[i]] = -INF;
    F top = set1(-INF);
    for (int p = 0; p < n_; p += LANES) top = max(top, loadu<F>(keys + p));
    order_.start(hmax(top));
  }

  // Pages of the next group; a prediction makes the first one larger.
  int group_size() const {
    const int share = (int)std::min<int64_t>((int64_t)pages_done_ * a_.group_percent / 100, n_);
    const int size = std::max(a_.group_pages, share);
    if (rounds_ || !a_.first_pages) return size;
    const int end = a_.first_pages[(int64_t)row_ * a_.rows.num_kv_heads + head_];
    return std::max(size, std::min(end, n_) - pages_done_);
  }

  // The mass that a page has to exceed by the marginal rule, as things stand; and what is known of
  // pages by their keys alone, with a margin for rounding.
  void set_bars() {
    sure_ = -INF;
    never_ = INF;
    // What lies behind the heads in m and l is of the same piece of memory, and of no consequence.
    for (int g = 0; g < group_; g += LANES)
      storeu(bar_ + g, loadu<F>(st_.m + g) + log(loadu<F>(st_.l + g)) + a_.threshold[row_]);
    for (int g = 0; g < group_; g++) {
      sure_ = std::max(sure_, bar_[g] - total_[g]);
      never_ = std::min(never_, bar_[g] - total_[g]);
    }
    const float margin = 1e-3f + 1e-5f * std::max(std::abs(sure_), std::abs(never_));
    sure_ += margin;
    never_ -= margin;
  }
  // Whether the page `ahead` places behind the next one passes the marginal rule.
  bool worth(int ahead) const {
    const float key = order_.key(ahead);
    if (key > sure_) return true;
    if (key < never_) return false;
    const int page = order_.peek(ahead);
    bool more = false;
    for (int g = 0; g < group_; g++) more |= left_.head(g)[page] > bar_[g];
    return more;
  }

  // A page that does not pass the test now cannot pass it later: the attended mass only grows.
  void marginal() {
    const auto keep = [&](int p) {
      I pass{};
      for (int g = 0; g < group_; g++) pass |= loadu<F>(left_.head(g) + p) > set1(bar_[g]);
      return pass;
    };
    for (;;) {
      set_bars();
      ask();
      const int size = group_size();
      int count = 0;
      // The whole group is judged against the mass attended before it.
      while (count < size) {
        order_.prepare(1, never_, keep);
        if (!order_.prepared()) break;
        const bool wanted = worth(0);
        const int page = order_.pop();
        if (wanted) picked_[count++] = page;
      }
      if (!count) break;
      ask();
      int then = 0;
      if (count == size) {
        order_.prepare(step_, never_, keep);
        for (int i = 0; i < order_.prepared() && then < step_; i++)
          if (worth(i)) then_[then++] = order_.peek(i);
      }
      attend(picked_, count, then_, then, rounds_ > 0, false);
      rounds_++;
    }
    for (int g = 0; g < group_; g++) rest_[g].compute(left_, g);
  }

  void coverage() {
    const float threshold = a_.threshold[row_];
    const auto keep = [](int) { return set1i(-1); };
    for (;;) {
      bool stop = true;
      for (int g = 0; g < group_; g++) {
        ask();
        rest_[g].refresh(left_, g);
        stop &= rest_[g].log_sum() + kappa_[g] <= st_.log_mass(g) + threshold;
      }
      const int size = group_size();
      order_.prepare(size > n_ - step_ ? n_ : size + step_, -INF, keep);
      if (stop || !order_.prepared()) break;
      if (mode_ == PSA_COVERAGE) next_group();
      int count = 0, then = 0;
      while (count < size && order_.prepared()) picked_[count++] = order_.pop();
      while (then < std::min(step_, order_.prepared())) then_[then] = order_.peek(then), then++;
      attend(picked_, count, then_, then, rounds_ > 0, true);
      for (int g = 0; g < group_; g++) kappa_[g] = correction(g);
      rounds_++;
    }
  }

  void write_stats() {
    float* s = stats_of(a_, row_, head_);
    float covered = 1;
    if (pages_done_ < n_)
      for (int g = 0; g < group_; g++) {
        const float left = rest_[g].log_sum() + kappa_[g] - st_.log_mass(g);
        covered = std::min(covered, 1 / (1 + std::exp(left)));
      }
    s[PSA_PAGES_ATTENDED] = (float)pages_done_;
    s[PSA_TOKENS_ATTENDED] = (float)tokens_done_;
    s[PSA_PAGES_SCORED] = (float)scored_;
    s[PSA_ROUNDS] = (float)rounds_;
    s[PSA_ESTIMATED_COVERAGE] = covered;
    s[PSA_STALE_PAGES] = (float)stale_pages_;
  }

  const PsaDecodeArgs& a_;
  Pool& pool_;
  const int row_, head_, group_, n_, dim_;
  const int step_, step_pitch_;  // pages of a block; the same padded to LANES
  const int mode_;
  const AttendBlock<T> attend_block_;
  uint8_t* const attended_;
  HeadState st_;
  BlockSpace<T> space_;
  Estimates left_;
  Ranking order_;
  int *picked_, *then_;
  int *filled_, num_filled_ = 0;  // pages that space_.now was filled with ahead of time
  int asked_ = 0;                 // keys of it that were asked for between blocks, and before them
  float *total_, *kappa_, *bar_;
  float sure_ = 0, never_ = 0;       // keys above pass the marginal rule, keys below do not
  float *mass_, *estimate_;          // of the pages of a block, [G][step_pitch_]
  Residuals *residuals_, *earlier_;  // of the last group (conservative: of all), of those before
  LeftMass* rest_;                   // follows left_ once the pages are ranked; marginal: at the end
  bool ranked_ = false;
  int pages_done_ = 0, tokens_done_ = 0, forced_ = 0, scored_ = 0, rounds_ = 0, stale_pages_ = 0;
};

}  // namespace psa
