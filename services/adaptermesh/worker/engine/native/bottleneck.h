// Bottlenecks beside a sub-layer: stream += s (up act(down v + b) + c), each token with its own adapter's.
#pragma once

#include <cmath>

#include "lowrank.h"

enum Activation : int32_t { kLinear, kRelu, kGelu, kGeluNew, kSilu, kTanh, kSigmoid, kLeakyRelu };

// What v is: the sub-layer's output, that plus the stream before it, or the stream before it.
enum BottleneckInput : int32_t { kOutput, kSum, kResidual };

// What one adapter has beside one sub-layer of one layer. `rows`: down as A, up as B, scales of one; rank 0: nothing.
struct Bottleneck {
  Rows rows;
  const float* down_bias;  // [rank]
  const float* up_bias;    // [hidden]
  float scale;
  int32_t activation;
  int32_t input;
  int32_t unused;
};

// Those of a step. `tables`: by token its adapter's, [blocks][layers], or null. `inner`: [blocks][tokens][max_width].
// `used`: bit n is set if some token has one at block n.
struct Bottlenecks {
  const Bottleneck* const* tables;
  float* inner;
  int32_t max_width;
  int32_t used;
};

// One block site of one layer in one step; as Site is for the low-rank op.
struct BlockSite {
  const Bottlenecks* held;
  int index;  // block * layers + layer
  int inputs;
  float* inner;  // [tokens][max_width]

  const Bottleneck* of(int token) const {
    const Bottleneck* table = held->tables[token];
    return table && table[index].rows.rank ? table + index : nullptr;
  }
  const Rows* rows(int token) const {
    const Bottleneck* found = of(token);
    return found ? &found->rows : nullptr;
  }
  float* inner_of(int token) const { return inner + static_cast<ptrdiff_t>(token) * held->max_width; }
  int stride() const { return held->max_width; }
};

static inline float activate(float x, int32_t activation) {
  switch (activation) {
    case kRelu: return x > 0.0f ? x : 0.0f;
    case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case kGeluNew: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case kSilu: return x / (1.0f + std::exp(-x));
    case kTanh: return std::tanh(x);
    case kSigmoid: return 1.0f / (1.0f + std::exp(-x));
    case kLeakyRelu: return x > 0.0f ? x : 0.01f * x;
    default: return x;
  }
}

// Computes s act(down v + b) of one token. v: [hidden].
static inline void narrow(const BlockSite& site, int token, const Bottleneck& bottleneck, const float* v) {
  shrink(site, token, v);
  float* inner = site.inner_of(token);
  for (int r = 0; r < bottleneck.rows.rank; ++r)
    inner[r] = bottleneck.scale * activate(inner[r] + bottleneck.down_bias[r], bottleneck.activation);
}

// Adds a panel's outputs of tokens [begin, end) to the stream; `narrow` went before. stream: rows `stride` apart.
static inline void widen(const BlockSite& site, int begin, int end, int panel, int columns, float* stream, ptrdiff_t stride) {
  alignas(64) float y[kTokens * kPanel];
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(end - begin) * kPanel);
  expand(site, begin, end, panel, y);
  const int first = panel * kPanel, count = columns - first < kPanel ? columns - first : kPanel;
  for (int token = begin; token < end; ++token) {
    const Bottleneck* found = site.of(token);
    if (!found) continue;
    float* to = stream + token * stride + first;
    const float *part = y + static_cast<ptrdiff_t>(token - begin) * kPanel, *bias = found->up_bias + first;
    for (int i = 0; i < count; ++i) to[i] += part[i] + found->scale * bias[i];
  }
}
