// The low-rank part of a site: y += s B (A x), each token with its own adapter's rank rows.
//
// A token meets its own rows only, in their order, so its result does not depend on who else is in the batch.
#pragma once

#include "product.h"

// What one adapter has at one site of one layer. A: [rank, in]. B: in panels of outputs as the base's matrices have
// them, [panels][rank][kPanel], so that what one panel needs is one run of memory. scales: [rank]. Rank 0: nothing.
struct Rows {
  const float* a;
  const float* b;
  const float* scales;
  int64_t rank;
};

// The adapters of a step. `tables`: by token its adapter's rows, [sites][layers], or null for the base. `inner`:
// [sites][tokens][max_rank], s A x once it is computed. `used`: bit n is set if some token has rows at site n.
struct Adapters {
  const Rows* const* tables;
  float* inner;
  int32_t max_rank;
  int32_t used;
};

// One site of one layer in one step.
struct Site {
  const Adapters* adapters;
  int index;  // of the row of Rows in the tables: site * layers + layer
  int inputs;
  float* inner;  // [tokens][max_rank]

  const Rows* rows(int token) const {
    const Rows* table = adapters->tables[token];
    return table && table[index].rank ? table + index : nullptr;
  }
  float* inner_of(int token) const { return inner + static_cast<ptrdiff_t>(token) * adapters->max_rank; }
  int stride() const { return adapters->max_rank; }
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
template <class At>
static inline void shrink(const At& site, int token, const float* x) {
  const Rows* rows = site.rows(token);
  if (!rows) return;
  const int rank = static_cast<int>(rows->rank);
  const ptrdiff_t inputs = site.inputs;
  float* to = site.inner_of(token);
  int r = 0;
  for (; r + 4 <= rank; r += 4) dots<4>(x, rows->a + r * inputs, site.inputs, rows->scales + r, to + r);
  for (; r < rank; ++r) dots<1>(x, rows->a + r * inputs, site.inputs, rows->scales + r, to + r);
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
template <class At>
static inline void expand(const At& site, int begin, int end, int panel, float* y) {
  for (int token = begin; token < end;) {
    const Rows* rows = site.rows(token);
    int count = 1;
    // Tokens of one adapter stand together and share its rows.
    while (count < 4 && token + count < end && site.rows(token + count) == rows) ++count;
    if (rows) {
      const int rank = static_cast<int>(rows->rank), stride = site.stride();
      const float* b = rows->b + static_cast<ptrdiff_t>(panel) * rank * kPanel;
      const float* inner = site.inner_of(token);
      float* to = y + static_cast<ptrdiff_t>(token - begin) * kPanel;
      switch (count) {
        case 1: expand_tile<1>(b, rank, inner, stride, to); break;
        case 2: expand_tile<2>(b, rank, inner, stride, to); break;
        case 3: expand_tile<3>(b, rank, inner, stride, to); break;
        case 4: expand_tile<4>(b, rank, inner, stride, to); break;
      }
    }
    token += count;
  }
}

// Asks for what `expand` will read of B, a little at a time while the product that comes before it computes: else
// memory would stand still during the product and be waited for after it.
class Expectation {
 public:
  // Panels [panel, panel + panels) of tokens [begin, end).
  void want(const Site& site, int begin, int end, int panel, int panels) {
    const Rows* known = nullptr;
    for (int token = begin; token < end && wanted_ < kMost; ++token) {
      const Rows* rows = site.rows(token);
      if (!rows || rows == known) continue;
      known = rows;
      const int64_t lines = panels * rows->rank * kPanel / kLine;
      runs_[wanted_++] = {rows->b + panel * rows->rank * kPanel, static_cast<int>(lines < kMostLines ? lines : kMostLines)};
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

// One module on its way into an adapter's memory. from_a: [rank, inputs]. from_b: [outputs, rank]. The rest as in Rows.
struct Load {
  const float* from_a;
  const float* from_b;
  float* a;
  float* b;
  float* scales;
  int32_t inputs;
  int32_t outputs;
  int32_t rank;
  float scale;
};

// Lays a B of [outputs, rank] out in panels; the last panel is filled up with zeros.
static inline void pack_b(const float* from, int outputs, int rank, float* to) {
  for (int first = 0; first < outputs; first += kPanel, to += static_cast<ptrdiff_t>(rank) * kPanel) {
    const int count = outputs - first < kPanel ? outputs - first : kPanel;
    const float* rows = from + static_cast<ptrdiff_t>(first) * rank;
    for (int r = 0; r < rank; ++r) {
      for (int i = 0; i < count; ++i) to[r * kPanel + i] = rows[static_cast<ptrdiff_t>(i) * rank + r];
      for (int i = count; i < kPanel; ++i) to[r * kPanel + i] = 0.0f;
    }
  }
}

static inline void load_module(const Load& load) {
  std::memcpy(load.a, load.from_a, sizeof(float) * load.rank * static_cast<size_t>(load.inputs));
  pack_b(load.from_b, load.outputs, load.rank, load.b);
  for (int r = 0; r < load.rank; ++r) load.scales[r] = load.scale;
}
