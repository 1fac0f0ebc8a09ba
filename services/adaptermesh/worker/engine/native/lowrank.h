// The low-rank part of a site: y += s B (A x), each token with its own adapter's rank rows.
//
// A and B are read where they lie in the arena. A: [rows, in]. B: an adapter's rows together, in panels of outputs as
// the base's matrices have them, [panels][rank][kPanel], so that what one panel needs is one run of memory. A token
// meets its own rows only, in their order, so its result does not depend on who else is in the batch.
#pragma once

#include "product.h"

// One site in one step. `starts` and `ranks` are by token; rank 0 is a token without an adapter here.
// a, b, scales: of layer 0; null if no token has rows here. The strides lead from layer to layer, in floats.
// inner: [tokens, max_rank], s A x once it is computed.
struct Site {
  const float* a;
  const float* b;
  const float* scales;
  int64_t a_stride;
  int64_t b_stride;
  int64_t scale_stride;
  const int32_t* starts;
  const int32_t* ranks;
  float* inner;
  int32_t max_rank;
  int32_t inputs;
  int32_t panel_count;

  const float* rows_of_b(int layer, int64_t start, int rank, int panel) const {
    return b + layer * b_stride + (start * panel_count + static_cast<int64_t>(panel) * rank) * kPanel;
  }
};

template <int R>
static inline void dots(const float* x, const float* a, int inputs, const float* scales, float* to) {
  Vec even[R], odd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) even[r] = odd[r] = Vec{};
  int k = 0;
  for (; k + 2 * kLanes <= inputs; k += 2 * kLanes) {
    const Vec left = load(x + k), right = load(x + k + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      even[r] += left * load(a + static_cast<ptrdiff_t>(r) * inputs + k);
      odd[r] += right * load(a + static_cast<ptrdiff_t>(r) * inputs + k + kLanes);
    }
  }
  for (int r = 0; r < R; ++r) {
    float total = sum(even[r] + odd[r]);
    for (int rest = k; rest < inputs; ++rest) total += x[rest] * a[static_cast<ptrdiff_t>(r) * inputs + rest];
    to[r] = total * scales[r];
  }
}

// Computes `inner` of one token. x: [inputs].
__attribute__((noinline)) static void shrink(const Site& site, int layer, int token, const float* x) {
  const int rank = site.ranks[token];
  if (rank == 0) return;
  const int64_t start = site.starts[token];
  const float* a = site.a + layer * site.a_stride + start * site.inputs;
  const float* scales = site.scales + layer * site.scale_stride + start;
  float* to = site.inner + static_cast<ptrdiff_t>(token) * site.max_rank;
  int r = 0;
  for (; r + 4 <= rank; r += 4) dots<4>(x, a + static_cast<ptrdiff_t>(r) * site.inputs, site.inputs, scales + r, to + r);
  for (; r < rank; ++r) dots<1>(x, a + static_cast<ptrdiff_t>(r) * site.inputs, site.inputs, scales + r, to + r);
}

template <int M>
static inline void expand_tile(const float* b, int rank, const float* inner, int stride, float* y) {
  Vec sums[M][2];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    sums[m][0] = load(y + m * kPanel);
    sums[m][1] = load(y + m * kPanel + kLanes);
  }
  for (int r = 0; r < rank; ++r, b += kPanel) {
    const Vec left = load(b), right = load(b + kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec value = splat(inner[m * stride + r]);
      sums[m][0] += value * left;
      sums[m][1] += value * right;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    store(y + m * kPanel, sums[m][0]);
    store(y + m * kPanel + kLanes, sums[m][1]);
  }
}

// Adds a panel's outputs of tokens [begin, end) to y, [tokens][kPanel].
__attribute__((noinline)) static void expand(const Site& site, int layer, int begin, int end, int panel, float* y) {
  for (int token = begin; token < end;) {
    const int rank = site.ranks[token];
    const int32_t start = site.starts[token];
    if (rank == 0) {
      ++token;
      continue;
    }
    int count = 1;
    while (count < 4 && token + count < end && site.ranks[token + count] == rank && site.starts[token + count] == start)
      ++count;
    const float* b = site.rows_of_b(layer, start, rank, panel);
    const float* inner = site.inner + static_cast<ptrdiff_t>(token) * site.max_rank;
    float* to = y + static_cast<ptrdiff_t>(token - begin) * kPanel;
    switch (count) {
      case 1: expand_tile<1>(b, rank, inner, site.max_rank, to); break;
      case 2: expand_tile<2>(b, rank, inner, site.max_rank, to); break;
      case 3: expand_tile<3>(b, rank, inner, site.max_rank, to); break;
      case 4: expand_tile<4>(b, rank, inner, site.max_rank, to); break;
    }
    token += count;
  }
}

// Asks for what `expand` will read of B, a little at a time while the product that comes before it computes: else
// memory would stand still during the product and be waited for after it.
class Expectation {
 public:
  // Panels [panel, panel + panels) of tokens [begin, end).
  void want(const Site& site, int layer, int begin, int end, int panel, int panels) {
    int64_t known = -1;
    for (int token = begin; token < end && wanted_ < kMost; ++token) {
      const int rank = site.ranks[token];
      // Tokens of one adapter stand together: their rows are asked for once.
      if (rank == 0 || site.starts[token] == known) continue;
      known = site.starts[token];
      const int lines = panels * rank * kPanel / kLine;
      runs_[wanted_++] = {site.rows_of_b(layer, known, rank, panel), lines < kMostLines ? lines : kMostLines};
    }
  }

  // Asks for so many lines.
  void some(int lines) {
    for (; lines > 0 && run_ < wanted_; --lines) {
      __builtin_prefetch(runs_[run_].from + line_ * kLine, 0, 2);
      if (++line_ >= runs_[run_].lines) {
        line_ = 0;
        ++run_;
      }
    }
  }

 private:
  static constexpr int kMost = 2 * kTokens;
  static constexpr int kMostLines = 128;
  static constexpr int kLine = 16;  // floats of a cache line

  struct Run {
    const float* from;
    int lines;
  };

  Run runs_[kMost];
  int wanted_ = 0;
  int run_ = 0;
  int line_ = 0;
};
