// Attention in place over the paged cache.
//
// A block of the cache holds `block` positions of one layer: for each key head first the keys, [dim][block], then
// the values, [block][dim]. Queries of one key head share its keys, so they are computed together, a few rows at
// once. Scores are kept for kReach positions, counted from 0; what comes after is joined by the usual rescaling
// of a running softmax. Source: FlashAttention (arXiv:2205.14135), section 3.1. As the cuts are by position and
// the sums go over positions in order, a token's result is the same whether it comes alone or in a chunk.
// `block` and `dim` are multiples of kWidth, and `block` divides kReach.
#pragma once

#include <cmath>

#include "vector.h"

constexpr int kRows = 6;      // queries of one register tile
constexpr int kReach = 512;   // positions whose scores are kept
constexpr int kMaxDim = 256;  // largest size of a head
constexpr int kWidth = 8;     // lanes: small blocks and heads fit, and what is computed here waits for memory anyway

using Eight = VectorOf<kWidth>::F;

struct Cache {
  float* data;  // of one layer: [blocks][kv_heads][2][block * dim]
  int32_t block;
  int32_t kv_heads;
  int32_t dim;

  float* keys(int64_t number, int head) const {
    return data + (number * kv_heads + head) * 2 * static_cast<int64_t>(block) * dim;
  }
  float* values(int64_t number, int head) const { return keys(number, head) + static_cast<int64_t>(block) * dim; }
};

// Rows of queries over one key head. The row sees positions [from, last].
struct Queries {
  const float* q[kRows];
  float* out[kRows];
  int32_t from[kRows];
  int32_t last[kRows];
};

// Sums in registers: enough of them to hide the latency of one behind the others, as many as there is room for.
template <int M>
constexpr int wide() {
  return M <= 3 ? 4 : 2;
}

// scores: [M][kReach], of W vectors of positions.
template <int M, int W>
static inline void score(const float* const* q, const float* keys, int block, int dim, float scaling, float* scores,
                         const float* next) {
  Eight sums[M][W];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[m][w] = Eight{};
  for (int i = 0; i < dim; ++i, keys += block) {
    Eight key[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) key[w] = load<Eight>(keys + w * kWidth);
    // The block's values, and the keys of the next one.
    __builtin_prefetch(keys + static_cast<ptrdiff_t>(block) * dim, 0, 2);
    __builtin_prefetch(next + static_cast<ptrdiff_t>(i) * block, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Eight value = splat<Eight>(q[m][i]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[m][w] += value * key[w];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(scores + m * kReach + w * kWidth, sums[m][w] * scaling);
}

template <int M>
static inline void score_block(const float* const* q, const float* keys, int block, int dim, float scaling,
                               float* scores, const float* next) {
  int j = 0;
  for (; j + 2 * kWidth <= block; j += 2 * kWidth) score<M, 2>(q, keys + j, block, dim, scaling, scores + j, next + j);
  for (; j < block; j += kWidth) score<M, 1>(q, keys + j, block, dim, scaling, scores + j, next + j);
}

// out[...][i, i + W vectors) += the weighted values of positions [begin, end).
template <int M, int W>
static inline void weigh_columns(const Cache& cache, const int32_t* table, int head, int begin, int end,
                                 const float* weights, float (*out)[kMaxDim], int i) {
  Eight sums[M][W];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[m][w] = load<Eight>(out[m] + i + w * kWidth);
  for (int position = begin; position < end;) {
    const int offset = position % cache.block;
    const int stop = end - position < cache.block - offset ? end - position : cache.block - offset;
    const float* values = cache.values(table[position / cache.block], head) + static_cast<ptrdiff_t>(offset) * cache.dim + i;
    const float* weight = weights + position - begin;
    for (int j = 0; j < stop; ++j, values += cache.dim) {
      Eight value[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) value[w] = load<Eight>(values + w * kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Eight share = splat<Eight>(weight[m * kReach + j]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[m][w] += share * value[w];
      }
    }
    position += stop;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out[m] + i + w * kWidth, sums[m][w]);
}

template <int M>
static inline void weigh(const Cache& cache, const int32_t* table, int head, int begin, int end, const float* weights,
                         float (*out)[kMaxDim]) {
  constexpr int kWide = wide<M>();
  int i = 0;
  for (; i + kWide * kWidth <= cache.dim; i += kWide * kWidth)
    weigh_columns<M, kWide>(cache, table, head, begin, end, weights, out, i);
  for (; i < cache.dim; i += kWidth) weigh_columns<M, 1>(cache, table, head, begin, end, weights, out, i);
}

template <int M>
static inline void attend(const Cache& cache, const int32_t* table, int head, const Queries& queries, float scaling) {
  alignas(64) float scores[M * kReach];
  alignas(64) float out[M][kMaxDim];
  float most[M], total[M];
  int first = queries.from[0], last = queries.last[0];
  for (int m = 0; m < M; ++m) {
    most[m] = -INFINITY;
    total[m] = 0.0f;
    std::memset(out[m], 0, cache.dim * sizeof(float));
    if (queries.from[m] < first) first = queries.from[m];
    if (queries.last[m] > last) last = queries.last[m];
  }
  for (int reach = first / kReach * kReach; reach <= last; reach += kReach) {
    // Blocks are whole in the scores: kReach is a multiple of their size.
    const int begin = reach > first / cache.block * cache.block ? reach : first / cache.block * cache.block;
    const int end = last + 1 < reach + kReach ? last + 1 : reach + kReach;
    for (int position = begin; position < end; position += cache.block) {
      const int next = position + cache.block <= last ? position + cache.block : position;
      score_block<M>(queries.q, cache.keys(table[position / cache.block], head), cache.block, cache.dim, scaling,
                     scores + position - begin, cache.keys(table[next / cache.block], head));
    }
    const int count = (end - begin + kWidth - 1) / kWidth * kWidth;
    for (int m = 0; m < M; ++m) {
      float* row = scores + m * kReach;
      const int low = queries.from[m] - begin, high = queries.last[m] + 1 - begin;
      for (int j = 0; j < low && j < count; ++j) row[j] = -INFINITY;
      for (int j = high > 0 ? high : 0; j < count; ++j) row[j] = -INFINITY;
      Eight peak = splat<Eight>(most[m]);
      for (int j = 0; j < count; j += kWidth) peak = largest(peak, load<Eight>(row + j));
      const float before = most[m];
      most[m] = largest_lane(peak);
      if (most[m] == -INFINITY) {  // nothing here is for this row
        std::memset(row, 0, count * sizeof(float));
        continue;
      }
      const Eight high_mark = splat<Eight>(most[m]);
      Eight sums{};
      for (int j = 0; j < count; j += kWidth) {
        const Eight weight = exponential(load<Eight>(row + j) - high_mark);
        store(row + j, weight);
        sums += weight;
      }
      if (before != most[m] && before != -INFINITY) {
        const float shrunk = exponential(splat<Eight>(before - most[m]))[0];
        total[m] *= shrunk;
        for (int i = 0; i < cache.dim; ++i) out[m][i] *= shrunk;
      }
      total[m] += sum(sums);
    }
    weigh<M>(cache, table, head, begin, end, scores, out);
  }
  for (int m = 0; m < M; ++m) {
    const float share = 1.0f / total[m];
    for (int i = 0; i < cache.dim; ++i) queries.out[m][i] = out[m][i] * share;
  }
}

static inline void attend_rows(int count, const Cache& cache, const int32_t* table, int head, const Queries& queries,
                               float scaling) {
  switch (count) {
    case 1: return attend<1>(cache, table, head, queries, scaling);
    case 2: return attend<2>(cache, table, head, queries, scaling);
    case 3: return attend<3>(cache, table, head, queries, scaling);
    case 4: return attend<4>(cache, table, head, queries, scaling);
    case 5: return attend<5>(cache, table, head, queries, scaling);
    case 6: return attend<6>(cache, table, head, queries, scaling);
  }
}
