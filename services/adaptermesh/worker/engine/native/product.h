// y = x W^T for few tokens and for many, with W packed once into panels.
//
// A panel holds kPanel outputs: [in][kPanel]. The products of one token with one output are added in the order
// of the inputs, in blocks of kDepth, whatever else is computed beside it: a token's result is the same to the
// last bit in every batch.
#pragma once

#include "vector.h"

#if defined(__AVX512F__)
constexpr int kTile = 12;    // tokens of one register tile
constexpr int kDepth = 192;  // inputs of one block: its part of a panel stays in the first cache
#else
constexpr int kTile = 6;
constexpr int kDepth = 256;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kTokens = 96;  // tokens computed before the next panel is read

enum WeightKind : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// A matrix in panels. `kind` tells how its values are stored; they are computed in float32 in either case.
struct Matrix {
  const void* panels;
  const float* bias;  // [panels * kPanel], zero where there is none; or null
  int32_t kind;
  int32_t inputs;
  int32_t panel_count;
};

// What a tile asks for while it computes: `step` bytes of the next block for each input.
struct Ahead {
  const char* from;
  int step;
};

// W: float, or uint16_t for bfloat16, which is widened on its way into the registers.
template <int M, class W>
static inline void tile(const float* x, ptrdiff_t stride, const W* w, int depth, float* y, bool fresh, Ahead ahead) {
  Vec sums[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sums[m][0] = fresh ? Vec{} : load(y + m * kPanel);
    sums[m][1] = fresh ? Vec{} : load(y + m * kPanel + kLanes);
  }
  for (int k = 0; k < depth; ++k) {
    const Vec left = load(w + k * kPanel), right = load(w + k * kPanel + kLanes);
    __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
    if (kPanel > 16) __builtin_prefetch(ahead.from + k * ahead.step + ahead.step / 2, 0, 2);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec value = splat(x[m * stride + k]);
      sums[m][0] += value * left;
      sums[m][1] += value * right;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(y + m * kPanel, sums[m][0]);
    store(y + m * kPanel + kLanes, sums[m][1]);
  }
}

template <class W>
static inline void any_tile(int count, const float* x, ptrdiff_t stride, const W* w, int depth, float* y, bool fresh,
                            Ahead ahead) {
  switch (count) {
#define CASE(M) \
  case M:       \
    return tile<M, W>(x, stride, w, depth, y, fresh, ahead)
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
#if defined(__AVX512F__)
    CASE(7);
    CASE(8);
    CASE(9);
    CASE(10);
    CASE(11);
    CASE(12);
#endif
#undef CASE
  }
}

static inline void widen(const uint16_t* from, int count, float* to) {
  for (int i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

// x: [count, inputs], rows `stride` apart. y: [count, kPanel]. count <= kTokens. `between` is called after each tile.
template <class Between>
static inline void panel_product(const Matrix& matrix, int panel, const float* x, ptrdiff_t stride, int count, float* y,
                                 Between between) {
  alignas(64) float room[kDepth * kPanel];
  const int groups = (count + kTile - 1) / kTile;
  const int size = kPanel * (matrix.kind == kFloat32 ? 4 : 2);
  // Blocks of about the same size: a short one would end before the next has come from memory.
  const int blocks = (matrix.inputs + kDepth - 1) / kDepth;
  const int even = (matrix.inputs + blocks - 1) / blocks;
  for (int k = 0; k < matrix.inputs; k += even) {
    const int depth = matrix.inputs - k < even ? matrix.inputs - k : even;
    const size_t first = static_cast<size_t>(panel) * matrix.inputs + k;
    const float* wide = room;
    const uint16_t* narrow = nullptr;
    if (matrix.kind == kFloat32) {
      wide = static_cast<const float*>(matrix.panels) + first * kPanel;
    } else {
      narrow = static_cast<const uint16_t*>(matrix.panels) + first * kPanel;
      // What several tiles read is widened once, in the first cache.
      if (groups > 1) widen(narrow, depth * kPanel, room);
    }
    // The next block is asked for evenly while this one computes: memory and arithmetic work side by side.
    const char* next = static_cast<const char*>(matrix.panels) + (first + depth) * size;
    for (int group = 0, begin = 0; group < groups; ++group) {
      const int end = static_cast<int>(static_cast<int64_t>(count) * (group + 1) / groups);
      const Ahead ahead{next + static_cast<ptrdiff_t>(depth) * size * group / groups, (size + groups - 1) / groups};
      const float* from = x + begin * stride + k;
      float* to = y + begin * kPanel;
      if (narrow != nullptr && groups == 1)
        any_tile(end - begin, from, stride, narrow, depth, to, k == 0, ahead);
      else
        any_tile(end - begin, from, stride, wide, depth, to, k == 0, ahead);
      between();
      begin = end;
    }
  }
  if (matrix.bias != nullptr) {
    const float* bias = matrix.bias + panel * kPanel;
    const Vec left = load(bias), right = load(bias + kLanes);
    for (int m = 0; m < count; ++m) {
      store(y + m * kPanel, load(y + m * kPanel) + left);
      store(y + m * kPanel + kLanes, load(y + m * kPanel + kLanes) + right);
    }
  }
}
