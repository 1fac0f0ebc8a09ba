// A random model with adapters and sequences, and what it gives by the plain formulas, in float64.
//
// Every array is exactly as large as the kernels may read; what they must not read is NaN or was never written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>

#include "decoder.cpp"

namespace {

thread_local std::mt19937 engine;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
float noise() { return std::normal_distribution<float>(0.0f, 1.0f)(engine); }
bool chance(double share) { return std::uniform_real_distribution<double>(0.0, 1.0)(engine) < share; }

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// Memory without values, so that a sanitizer sees what is read of it too early.
template <class T>
struct Raw {
  explicit Raw(size_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
  ~Raw() { std::free(data); }
  Raw(const Raw&) = delete;
  T* data;
};

Floats random_floats(size_t count, float scale) {
  Floats found(count);
  for (float& one : found) one = noise() * scale;
  return found;
}

float bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

struct Linear {
  int outputs, inputs;
  Floats weight, bias;
  std::unique_ptr<Raw<char>> panels;
  Floats padded;
  Matrix matrix;

  Linear(int outputs, int inputs, bool biased, bool narrow)
      : outputs(outputs),
        inputs(inputs),
        weight(random_floats(static_cast<size_t>(outputs) * inputs, 1.0f / std::sqrt(inputs))) {
    if (narrow)
      for (float& one : weight) one = bfloat16(one);
    const int count = (outputs + kPanel - 1) / kPanel;
    panels = std::make_unique<Raw<char>>(static_cast<size_t>(count) * kPanel * inputs * (narrow ? 2 : 4));
    adaptermesh_pack(weight.data(), outputs, inputs, narrow ? kBFloat16 : kFloat32, panels->data, draw(1, 3));
    if (biased) {
      bias = random_floats(outputs, 0.1f);
      padded = bias;
      padded.resize(static_cast<size_t>(count) * kPanel);
    }
    matrix = {panels->data, biased ? padded.data() : nullptr, narrow ? kBFloat16 : kFloat32, inputs, count};
  }

  Doubles times(const Doubles& x) const {
    Doubles y(outputs);
    for (int o = 0; o < outputs; ++o) {
      for (int i = 0; i < inputs; ++i) y[o] += static_cast<double>(weight[static_cast<size_t>(o) * inputs + i]) * x[i];
      if (!bias.empty()) y[o] += bias[o];
    }
    return y;
  }
};

// One adapter at one site of one layer; every array ends where the kernels must stop.
struct Low {
  int rank = 0, outputs = 0;
  Floats a, b, rows_a, scales, panels;

  Low() = default;
  Low(int rank, int inputs, int outputs) : Low(rank, inputs, outputs, random_floats(1, 1.0f)[0]) {}
  Low(int rank, int inputs, int outputs, float scale)
      : rank(rank),
        outputs(outputs),
        a(random_floats(static_cast<size_t>(rank) * inputs, 1.0f / std::sqrt(inputs))),
        b(random_floats(static_cast<size_t>(rank) * outputs, 0.5f / std::sqrt(rank))),
        rows_a(a.size(), NAN),
        scales(rank, NAN),
        panels(static_cast<size_t>((outputs + kPanel - 1) / kPanel) * kPanel * rank, NAN) {
    const Load load{a.data(), b.data(), rows_a.data(), panels.data(), scales.data(), inputs, outputs, rank, scale};
    adaptermesh_load(&load, 1);
  }

  Rows rows() const { return {rows_a.data(), panels.data(), scales.data(), rank}; }
};

// One bottleneck, with arrays that end where the kernels must stop.
struct Beside {
  Low low;
  Floats down_bias, up_bias;
  float scale = 0;
  int activation = 0, input = 0;

  Beside() = default;
  Beside(int width, int hidden)
      : low(width, hidden, hidden, 1.0f),
        down_bias(random_floats(width, 0.3f)),
        up_bias(random_floats(hidden, 0.3f)),
        scale(random_floats(1, 1.0f)[0]),
        activation(draw(kLinear, kLeakyRelu)),
        input(draw(kOutput, kResidual)) {}

  Bottleneck bottleneck() const {
    return {low.rows(), down_bias.data(), up_bias.data(), scale, activation, input, 0};
  }
};

struct Adapter {
  std::vector<std::vector<Low>> sites{kSites};  // [site][layer]
  std::vector<Rows> table;
  std::vector<std::vector<Beside>> blocks{kBlocks};  // [block][layer]
  std::vector<Bottleneck> beside;
  int used = 0, most = 0, used_blocks = 0, widest = 0;
};

void add(const Low& low, const Doubles& x, Doubles& y) {
  for (int r = 0; r < low.rank; ++r) {
    double inner = 0;
    for (size_t i = 0; i < x.size(); ++i) inner += x[i] * low.a[r * x.size() + i];
    inner *= low.scales[r];
    for (size_t o = 0; o < y.size(); ++o) y[o] += inner * low.b[o * low.rank + r];
  }
}

// What a bottleneck adds to the stream. residual, output: before and of the sub-layer.
Doubles term(const Beside& one, const Doubles& residual, const Doubles& output) {
  const size_t hidden = residual.size();
  Doubles found(hidden);
  if (!one.low.rank) return found;
  Doubles v = one.input == kResidual ? residual : output;
  for (size_t i = 0; i < hidden && one.input == kSum; ++i) v[i] += residual[i];
  for (int r = 0; r < one.low.rank; ++r) {
    double x = one.down_bias[r];
    for (size_t i = 0; i < hidden; ++i) x += v[i] * one.low.a[r * hidden + i];
    switch (one.activation) {
      case kRelu: x = std::max(x, 0.0); break;
      case kGelu: x = 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); break;
      case kGeluNew: x = 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); break;
      case kSilu: x = x / (1 + std::exp(-x)); break;
      case kTanh: x = std::tanh(x); break;
      case kSigmoid: x = 1 / (1 + std::exp(-x)); break;
      case kLeakyRelu: x = x > 0 ? x : 0.01 * x; break;
    }
    for (size_t o = 0; o < hidden; ++o) found[o] += x * one.low.b[o * one.low.rank + r];
  }
  for (size_t o = 0; o < hidden; ++o) found[o] = one.scale * (found[o] + one.up_bias[o]);
  return found;
}

struct LayerData {
  Floats norm_in, norm_mid, q_norm, k_norm;
  std::vector<Linear> matrices;
  std::unique_ptr<Raw<float>> cache;
};

constexpr int kBlocksOfAll = 160;

struct World {
  Model model{};
  std::vector<LayerData> data;
  std::vector<Layer> layers;
  Floats norm_out;
  std::unique_ptr<Linear> head;
  std::vector<Adapter> adapters;
  int ins[kSites], outs[kSites];

  World() {
    model.dim = 8 * draw(1, chance(0.1) ? 32 : 4);
    model.kv_heads = draw(1, 3);
    model.heads = model.kv_heads * draw(1, 8);
    model.hidden = draw(1, chance(0.3) ? 420 : 70);
    model.inner = draw(1, chance(0.3) ? 300 : 90);
    model.vocabulary = draw(1, 150);
    model.layer_count = draw(1, 2);
    const int blocks[] = {8, 16, 32, 64};
    model.block = blocks[draw(0, 3)];
    model.window = chance(0.4) ? 0 : chance(0.5) ? draw(1, 30) : draw(1, 700);
    model.epsilon = 1e-5f;
    std::iota(model.sites, model.sites + kSites, 0);
    std::shuffle(model.sites, model.sites + kSites, engine);
    model.scaling = 1.0f / std::sqrt(static_cast<float>(model.dim));
    const int q = model.heads * model.dim, kv = model.kv_heads * model.dim;
    const int in[] = {model.hidden, model.hidden, model.hidden, q, model.hidden, model.hidden, model.inner};
    const int out[] = {q, kv, kv, model.hidden, model.inner, model.inner, model.hidden};
    std::copy(in, in + kSites, ins);
    std::copy(out, out + kSites, outs);
    const bool biased = chance(0.3), normed = chance(0.3);
    for (int index = 0; index < model.layer_count; ++index) {
      LayerData one;
      one.norm_in = random_floats(model.hidden, 1.0f);
      one.norm_mid = random_floats(model.hidden, 1.0f);
      if (normed) {
        one.q_norm = random_floats(model.dim, 1.0f);
        one.k_norm = random_floats(model.dim, 1.0f);
      }
      for (int site = 0; site < kSites; ++site)
        one.matrices.emplace_back(outs[site], ins[site], biased && chance(0.7), chance(0.5));
      data.push_back(std::move(one));
    }
    norm_out = random_floats(model.hidden, 1.0f);
    head = std::make_unique<Linear>(model.vocabulary, model.hidden, false, chance(0.5));
    model.head = head->matrix;
    model.norm_out = norm_out.data();
    for (LayerData& one : data) {
      Layer layer{};
      layer.norm_in = one.norm_in.data();
      layer.norm_mid = one.norm_mid.data();
      if (normed) {
        layer.q_norm = one.q_norm.data();
        layer.k_norm = one.k_norm.data();
      }
      Matrix* to[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
      for (int site = 0; site < kSites; ++site) *to[site] = one.matrices[site].matrix;
      layers.push_back(layer);
    }
    model.layers = layers.data();
    make_adapters();
  }

  void fresh_cache() {
    const size_t size = static_cast<size_t>(kBlocksOfAll) * model.kv_heads * 2 * model.block * model.dim;
    for (int index = 0; index < model.layer_count; ++index) {
      data[index].cache = std::make_unique<Raw<float>>(size);
      std::fill_n(data[index].cache->data, size, NAN);
      layers[index].cache = data[index].cache->data;
    }
  }

  void make_adapters() {
    adapters.resize(draw(0, 3));
    for (Adapter& one : adapters) {
      one.table.resize(kSites * model.layer_count);
      for (int site = 0; site < kSites; ++site) {
        one.sites[site].resize(model.layer_count);
        if (chance(0.3)) continue;
        for (int layer = 0; layer < model.layer_count; ++layer) {
          if (chance(0.2)) continue;
          Low& low = one.sites[site][layer] = Low(chance(0.1) ? draw(1, 256) : draw(1, 9), ins[site], outs[site]);
          const int place = model.sites[site];
          one.table[place * model.layer_count + layer] = low.rows();
          one.used |= 1 << place;
          one.most = std::max(one.most, low.rank);
        }
      }
      one.beside.resize(kBlocks * model.layer_count);
      for (int block = 0; block < kBlocks; ++block) {
        one.blocks[block].resize(model.layer_count);
        if (chance(0.5)) continue;
        for (int layer = 0; layer < model.layer_count; ++layer) {
          if (chance(0.2)) continue;
          Beside& beside = one.blocks[block][layer] = Beside(draw(1, chance(0.1) ? 150 : 9), model.hidden);
          one.beside[block * model.layer_count + layer] = beside.bottleneck();
          one.used_blocks |= 1 << block;
          one.widest = std::max(one.widest, beside.low.rank);
        }
      }
    }
  }
};

struct Sequence {
  int adapter;
  int length;
  Floats hidden, cosines, sines;
  std::vector<int32_t> blocks;
  Floats logits;  // of all tokens, as the batches gave them
  int done = 0;
};

Doubles norm(const Doubles& x, const Floats& weight, float epsilon) {
  double squares = 0;
  for (double one : x) squares += one * one;
  const double factor = 1.0 / std::sqrt(squares / x.size() + epsilon);
  Doubles y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * factor * weight[i];
  return y;
}

// All logits of a sequence, number by number.
Doubles plainly(const World& world, const Sequence& sequence) {
  const Model& m = world.model;
  std::vector<Doubles> hidden;
  for (int t = 0; t < sequence.length; ++t)
    hidden.emplace_back(sequence.hidden.begin() + static_cast<ptrdiff_t>(t) * m.hidden,
                        sequence.hidden.begin() + static_cast<ptrdiff_t>(t + 1) * m.hidden);
  for (int index = 0; index < m.layer_count; ++index) {
    const LayerData& layer = world.data[index];
    const auto site = [&](int which, const Doubles& x) {
      Doubles y = layer.matrices[which].times(x);
      if (sequence.adapter >= 0) add(world.adapters[sequence.adapter].sites[which][index], x, y);
      return y;
    };
    const auto join = [&](int block, Doubles& stream, const Doubles& output) {
      const Doubles more = sequence.adapter < 0 ? Doubles(stream.size())
                                                : term(world.adapters[sequence.adapter].blocks[block][index], stream, output);
      for (int i = 0; i < m.hidden; ++i) stream[i] += output[i] + more[i];
    };
    std::vector<Doubles> queries, keys, values;
    for (int t = 0; t < sequence.length; ++t) {
      const Doubles x = norm(hidden[t], layer.norm_in, m.epsilon);
      Doubles q = site(kQ, x), k = site(kK, x);
      const auto turn = [&](Doubles& all, int heads, const Floats& weight) {
        for (int head = 0; head < heads; ++head) {
          Doubles one(all.begin() + head * m.dim, all.begin() + (head + 1) * m.dim);
          if (!weight.empty()) one = norm(one, weight, m.epsilon);
          for (int i = 0; i < m.dim; ++i) {
            const double other = i < m.dim / 2 ? -one[i + m.dim / 2] : one[i - m.dim / 2];
            const size_t at = static_cast<size_t>(t) * m.dim + i;
            all[head * m.dim + i] = one[i] * sequence.cosines[at] + other * sequence.sines[at];
          }
        }
      };
      turn(q, m.heads, layer.q_norm);
      turn(k, m.kv_heads, layer.k_norm);
      queries.push_back(q);
      keys.push_back(k);
      values.push_back(site(kV, x));
    }
    for (int t = 0; t < sequence.length; ++t) {
      Doubles mixed(static_cast<size_t>(m.heads) * m.dim);
      const int from = m.window && t >= m.window ? t + 1 - m.window : 0;
      for (int head = 0; head < m.heads; ++head) {
        const int shared = head / (m.heads / m.kv_heads);
        Doubles scores;
        double most = -INFINITY, total = 0;
        for (int p = from; p <= t; ++p) {
          double score = 0;
          for (int i = 0; i < m.dim; ++i) score += queries[t][head * m.dim + i] * keys[p][shared * m.dim + i];
          scores.push_back(score * m.scaling);
          most = std::max(most, scores.back());
        }
        for (double& score : scores) total += score = std::exp(score - most);
        for (int p = from; p <= t; ++p)
          for (int i = 0; i < m.dim; ++i)
            mixed[head * m.dim + i] += scores[p - from] / total * values[p][shared * m.dim + i];
      }
      join(kAttention, hidden[t], site(kO, mixed));
      const Doubles x = norm(hidden[t], layer.norm_mid, m.epsilon);
      const Doubles gate = site(kGate, x), up = site(kUp, x);
      Doubles inner(m.inner);
      for (int i = 0; i < m.inner; ++i) inner[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      join(kFeedForward, hidden[t], site(kDown, inner));
    }
  }
  Doubles logits;
  for (const Doubles& one : hidden)
    for (double logit : world.head->times(norm(one, world.norm_out, m.epsilon))) logits.push_back(logit);
  return logits;
}

}  // namespace
