// The progressive loop for one (row, KV head): forced pages, then groups until the rule stops.
#pragma once

#include "estimates.h"
#include "pool.h"
#include "ranking.h"
#include "residuals.h"

namespace psa {

constexpr int PREFETCH_PAGES = 2;  // distance between the page attended and the page fetched

template <class T>
class Progressive {
 public:
  Progressive(const PsaDecodeArgs& a, int row, int kv_head, Scratch& scratch)
      : a_(a),
        pool_(a, row),
        row_(row),
        head_(kv_head),
        group_(a.rows.num_qo_heads / a.rows.num_kv_heads),
        n_(num_pages(a.rows, row)),
        dim_(a.rows.head_dim),
        pitch_(padded(a.rows.page_size) + 4),
        attend_page_(attend_page_for<T>(dim_)),
        attended_(attended_of(a, row, kv_head)) {
    scratch.reset(HeadState::bytes(group_, dim_) + Estimates::bytes(group_, n_) +
                  Scratch::need<float>((size_t)HEAD_BLOCK * pitch_) + Scratch::need<uint8_t>(n_) +
                  Scratch::need<uint64_t>(n_) + Scratch::need<int>(n_) +
                  4 * Scratch::need<float>(group_) + 2 * Scratch::need<Residuals>(group_) +
                  Scratch::need<LeftMass>(group_));
    st_.take(scratch, group_, dim_);
    left_.take(scratch, group_, n_);
    logits_ = scratch.take<float>((size_t)HEAD_BLOCK * pitch_);
    stale_ = scratch.take<uint8_t>(n_);
    entries_ = scratch.take<uint64_t>(n_);
    forced_ = scratch.take<int>(n_);
    total_ = scratch.take<float>(group_);
    rest_ = scratch.take<LeftMass>(group_);
    kappa_ = scratch.take<float>(group_);
    mass_ = scratch.take<float>(group_);
    bar_ = scratch.take<float>(group_);
    residuals_ = scratch.take<Residuals>(group_);
    earlier_ = scratch.take<Residuals>(group_);
  }

  void run() {
    if (attended_) std::memset(attended_, 0, a_.rows.max_pages);
    st_.start(pool_.q(head_), a_.rows.q_head_stride, group_, dim_, a_.rows.sm_scale);
    const int64_t at = first_head();
    left_.copy_from(a_.log_mass + at * a_.rows.max_pages, a_.rows.max_pages);
    attend_forced();
    Ranking order(entries_);
    if (pages_done_ < n_) {
      rank(order);
      if (a_.mode[row_] == PSA_MARGINAL)
        marginal(order);
      else
        coverage(order);
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

  void attend(int page, int fetch, bool want_mass) {
    const PageView<T> p = pool_.view(page, head_, fetch, head_);
    attend_page_(st_, group_, dim_, p, logits_, pitch_, want_mass ? mass_ : nullptr);
    left_.remove(page);
    if (attended_) attended_[page] = 1;
    pages_done_++;
    tokens_done_ += p.tokens;
  }

  // Attends a page; if wanted, its residuals are added.
  void attend_and_compare(int page, int fetch, bool wanted) {
    for (int g = 0; wanted && g < group_; g++) bar_[g] = left_.head(g)[page];
    attend(page, fetch, wanted);
    for (int g = 0; wanted && g < group_; g++) residuals_[g].add(mass_[g], bar_[g]);
  }
  // Of the residuals since they were cleared, never below the correction that the call began with.
  float correction(int g) const {
    const float kappa = residuals_[g].correction(a_.kappa_std[row_], a_.kappa_floor[row_]);
    return a_.kappa_start ? std::max(kappa, a_.kappa_start[first_head() + g]) : kappa;
  }
  float start(int g) const {
    if (!a_.kappa_start || a_.mode[row_] != PSA_COVERAGE) return 0;
    return std::max(a_.kappa_start[first_head() + g], a_.kappa_floor[row_]);
  }
  // Starts the residuals of another group.
  void next_group() {
    for (int g = 0; g < group_; g++) {
      earlier_[g].add(residuals_[g]);
      residuals_[g].clear();
    }
  }

  void attend_forced() {
    left_.mark_stale(stale_);
    const int recent = n_ - std::max(a_.recent_pages, 1);
    int count = 0;
    for (int p = 0; p < n_; p++) {
      stale_pages_ += stale_[p];
      if (p < a_.sink_pages || p >= recent || stale_[p]) forced_[count++] = p;
    }
    const bool conservative = a_.mode[row_] == PSA_CONSERVATIVE;
    const bool wanted =
        conservative || (a_.residuals && a_.mode[row_] == PSA_COVERAGE);
    for (int g = 0; g < group_; g++) residuals_[g].clear(), earlier_[g].clear();
    for (int i = 0; i < count; i++) {
      const int ahead = i + PREFETCH_PAGES, page = forced_[i];
      attend_and_compare(page, ahead < count ? forced_[ahead] : -1,
                         wanted && !stale_[page]);
    }
    for (int g = 0; g < group_; g++) kappa_[g] = conservative ? correction(g) : start(g);
    scored_ = n_ - count;
  }

  // Adds the pages worth ordering. For the marginal rule these are the pages that pass the test
  // now: the attended mass only grows, so no other page can pass it later.
  void rank(Ranking& order) {
    for (int g = 0; g < group_; g++) {
      rest_[g].compute(left_, g);
      total_[g] = log_add_exp(st_.log_mass(g), rest_[g].log_sum());
      bar_[g] = a_.mode[row_] == PSA_MARGINAL ? st_.log_mass(g) + a_.threshold[row_] : -INF;
    }
    const bool all = a_.mode[row_] != PSA_MARGINAL;
    for (int p = 0; p < n_; p += LANES) {
      F key = set1(-INF);
      I pass{};
      for (int g = 0; g < group_; g++) {
        const F m = loadu<F>(left_.head(g) + p);
        key = max(key, m - total_[g]);
        pass |= m > set1(bar_[g]);
      }
      for (int i = 0; i < LANES && p + i < n_; i++)
        if (all ? !is_forced(p + i) : pass[i] != 0) order.add(key[i], p + i);
    }
  }
  bool is_forced(int p) const {
    return p < a_.sink_pages || p >= n_ - std::max(a_.recent_pages, 1) || stale_[p];
  }

  // Pages of the next group; a prediction makes the first one larger.
  int group_size() const {
    if (rounds_ || !a_.first_pages) return a_.group_pages;
    const int end = a_.first_pages[(int64_t)row_ * a_.rows.num_kv_heads + head_];
    return std::max(a_.group_pages, std::min(end, n_) - pages_done_);
  }

  void marginal(Ranking& order) {
    int next = 0;
    for (;;) {
      for (int g = 0; g < group_; g++) bar_[g] = st_.log_mass(g) + a_.threshold[row_];
      const int size = group_size();
      int picked = 0;
      // The whole group is judged against the mass attended before it.
      for (; next < order.size() && picked < size; next++) {
        const int page = order[next];
        bool worth = false;
        for (int g = 0; g < group_; g++) worth |= left_.head(g)[page] > bar_[g];
        if (!worth) continue;
        attend(page, order.peek(next + PREFETCH_PAGES), false);
        picked++;
      }
      if (!picked) break;
      rounds_++;
    }
    for (int g = 0; g < group_; g++) rest_[g].compute(left_, g);
  }

  void coverage(Ranking& order) {
    const float threshold = a_.threshold[row_];
    int next = 0;
    for (;;) {
      bool stop = true;
      for (int g = 0; g < group_; g++) {
        rest_[g].refresh(left_, g);
        stop &= rest_[g].log_sum() + kappa_[g] <= st_.log_mass(g) + threshold;
      }
      if (stop || next == order.size()) break;
      const int end = std::min(order.size(), next + group_size());
      if (a_.mode[row_] == PSA_COVERAGE) next_group();
      for (; next < end; next++) {
        const int page = order[next];
        attend_and_compare(page, order.peek(next + PREFETCH_PAGES), true);
        for (int g = 0; g < group_; g++) rest_[g].subtract(bar_[g]);
      }
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
  const RowPool<T> pool_;
  const int row_, head_, group_, n_, dim_, pitch_;
  const AttendPage<T> attend_page_;
  uint8_t* const attended_;
  HeadState st_;
  Estimates left_;
  uint8_t* stale_;
  uint64_t* entries_;
  int* forced_;
  float *logits_, *total_, *kappa_, *mass_, *bar_;
  Residuals *residuals_, *earlier_;  // of the last group (conservative: of all), of those before
  LeftMass* rest_;
  int pages_done_ = 0, tokens_done_ = 0, scored_ = 0, rounds_ = 0, stale_pages_ = 0;
};

}  // namespace psa
