// What adapters multiply into a site's input and output, and what they add to its output.
#pragma once

#include "vector.h"

// Of one site: values [rows][layers][width], and the distances of its rows and layers in floats; or null.
struct Factors {
  const float* values;
  int64_t row_stride;
  int64_t layer_stride;
};

// Those of one layer, for tokens: `rows` has the row of each one's factors, 0 for tokens that have none.
struct LayerFactors {
  const float* values;  // null: no token has any
  int64_t row_stride;
  const int32_t* rows;

  LayerFactors() : values(nullptr), row_stride(0), rows(nullptr) {}
  LayerFactors(const Factors& factors, const int32_t* of_tokens, int layer)
      : values(factors.values ? factors.values + layer * factors.layer_stride : nullptr),
        row_stride(factors.row_stride),
        rows(of_tokens) {}

  const float* of(int token) const { return values && rows[token] ? values + rows[token] * row_stride : nullptr; }
};

static inline void multiply(const float* x, const float* factors, int count, float* y) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) * load(factors + i));
  for (; i < count; ++i) y[i] = x[i] * factors[i];
}

static inline void add(const float* terms, int count, float* y) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(y + i) + load(terms + i));
  for (; i < count; ++i) y[i] += terms[i];
}

// What happens to a site's output in one layer, in this order.
struct Finish {
  LayerFactors factors;
  LayerFactors shifts;

  // A panel of tokens [begin, end). y: [tokens][kPanel], of which `columns` are outputs.
  void panel(int begin, int end, int panel, int columns, float* y) const {
    if (!factors.values && !shifts.values) return;
    const int count = columns < kPanel ? columns : kPanel;
    const ptrdiff_t start = static_cast<ptrdiff_t>(panel) * kPanel;
    for (int token = begin; token < end; ++token) {
      float* row = y + static_cast<ptrdiff_t>(token - begin) * kPanel;
      if (const float* found = factors.of(token)) multiply(row, found + start, count, row);
      if (const float* found = shifts.of(token)) add(found + start, count, row);
    }
  }
};
