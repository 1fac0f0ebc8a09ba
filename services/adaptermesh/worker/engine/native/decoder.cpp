// One step of a decoder of the Llama family on a CPU: all layers in one call, adapters and paged attention in place.
//
// The structures are mirrored in library.py. All arrays belong to the caller; nothing is kept between calls.

#include "attention.h"
#include "lowrank.h"
#include "product.h"
#include "scales.h"
#include "team.h"

enum SiteIndex { kQ, kK, kV, kO, kGate, kUp, kDown, kSites };

struct Layer {
  const float* norm_in;
  const float* norm_mid;
  const float* q_norm;  // [dim], or null
  const float* k_norm;
  float* cache;
  Matrix q, k, v, o, gate, up, down;
};

struct Model {
  const Layer* layers;
  const float* norm_out;
  Matrix head;
  int32_t layer_count;
  int32_t hidden;
  int32_t heads;
  int32_t kv_heads;
  int32_t dim;
  int32_t inner;
  int32_t vocabulary;
  int32_t block;
  int32_t sites[kSites];  // where each site stands in an adapter's table
  int32_t window;         // positions that a token sees, itself included; 0: all
  float epsilon;
  float scaling;
};

// Consecutive tokens of one sequence.
struct Span {
  int32_t first;   // its first token in the batch
  int32_t count;
  int32_t past;    // position of that token
  int32_t table;   // where its blocks begin in `tables`
};

// What a step's adapters multiply and add, by site. `rows`: [tokens], as in LayerFactors.
struct Scales {
  const int32_t* rows;
  Factors inputs[kSites];
  Factors outputs[kSites];
  Factors shifts[kSites];
};

struct Step {
  float* hidden;  // [tokens, hidden]: the embeddings at first, then what the layers make of them
  const float* cosines;  // [tokens, dim]
  const float* sines;
  const Span* spans;
  const int32_t* tables;
  const int32_t* outputs;  // tokens whose logits are wanted
  float* logits;           // [outputs, vocabulary]
  float* scratch;          // scratch_floats(model, tokens)
  Adapters adapters;
  Scales scales;
  int32_t tokens;
  int32_t span_count;
  int32_t output_count;
  int32_t first_layer;
  int32_t last_layer;  // exclusive; the head is computed if this is the number of layers
  int32_t threads;
};

namespace {

constexpr int kPhasesOfLayer = 10;
constexpr int kPhasesOfHead = 2;
constexpr int kExpected = 24;     // cache lines of B that are asked for after each tile of the base's product
constexpr int kOwn = 3;           // sites that may read one x, each with factors of its own
constexpr int kQueryTokens = 16;  // tokens of a prompt that one task attends for

struct Scratch {
  float* x;      // [tokens, hidden]
  float* own;    // [kOwn][tokens, hidden]: x as the factors of one site want it
  float* qkv;    // [tokens, (heads + 2 * kv_heads) * dim]
  float* mixed;  // [tokens, heads * dim]
  float* inner;  // [tokens, inner]
};

int64_t qkv_width(const Model& model) { return static_cast<int64_t>(model.heads + 2 * model.kv_heads) * model.dim; }

Scratch lay_out(const Model& model, int64_t tokens, float* memory) {
  Scratch found;
  found.x = memory;
  found.own = found.x + tokens * model.hidden;
  found.qkv = found.own + kOwn * tokens * model.hidden;
  found.mixed = found.qkv + tokens * qkv_width(model);
  found.inner = found.mixed + tokens * model.heads * model.dim;
  return found;
}

// A share of one joint product: its outputs go to columns [offset, offset + columns) of y.
struct Part {
  const Matrix* matrix;
  const float* x;
  bool adapted;
  Site site;
  Finish finish;
  int columns;
  int offset;
};

struct AttentionTask {
  int span;
  int first;  // within the span
  int count;
};

void normalise(const float* x, const float* weight, int size, float epsilon, float* y) {
  Vec squares{};
  int i = 0;
  float rest = 0.0f;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  for (int j = i; j < size; ++j) rest += x[j] * x[j];
  const float factor = 1.0f / std::sqrt((sum(squares) + rest) / size + epsilon);
  for (i = 0; i + kLanes <= size; i += kLanes) store(y + i, load(x + i) * factor * load(weight + i));
  for (; i < size; ++i) y[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cosines, const float* sines, int dim) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half];
    head[i] = low * cosines[i] - high * sines[i];
    head[i + half] = high * cosines[i + half] + low * sines[i + half];
  }
}

class Pass : public Job {
 public:
  Pass(const Model& model, const Step& step)
      : Job(step.threads, (step.last_layer - step.first_layer) * kPhasesOfLayer + kPhasesOfHead),
        model_(model),
        layers_(model.layers, model.layers + model.layer_count),
        step_(step),
        scratch_(lay_out(model, step.tokens, step.scratch)) {
    for (int index = 0; index < step.span_count; ++index) {
      const Span& span = step.spans[index];
      for (int first = 0; first < span.count; first += kQueryTokens) {
        const int left = span.count - first;
        attention_.push_back({index, first, left < kQueryTokens ? left : kQueryTokens});
      }
    }
  }

 protected:
  void run(Team::Member& member) override {
    for (int index = step_.first_layer; index < step_.last_layer; ++index) {
      const Layer& layer = layers_[index];
      attention_part(member, layer, index);
      feed_forward(member, layer, index);
    }
    if (step_.last_layer == model_.layer_count) head(member);
  }

 private:
  void attention_part(Team::Member& member, const Layer& layer, int index) const {
    const int q_width = model_.heads * model_.dim, kv_width = model_.kv_heads * model_.dim;
    const int64_t width = qkv_width(model_);
    member.phase(step_.tokens, [&](int token) {
      float* x = scratch_.x + static_cast<int64_t>(token) * model_.hidden;
      normalise(step_.hidden + static_cast<int64_t>(token) * model_.hidden, layer.norm_in, model_.hidden, model_.epsilon, x);
      for (SiteIndex site : {kQ, kK, kV}) take_in(site, index, token, x);
    });
    const Part parts[] = {part(layer.q, kQ, index, q_width, 0),
                          part(layer.k, kK, index, kv_width, q_width),
                          part(layer.v, kV, index, kv_width, q_width + kv_width)};
    product<3>(member, parts, model_.hidden, step_.tokens,
               [&](int token, int offset, int count, const float* y) {
                 std::memcpy(scratch_.qkv + token * width + offset, y, count * sizeof(float));
               });
    const Cache cache{layer.cache, model_.block, model_.kv_heads, model_.dim};
    member.phase(static_cast<int>(attention_.size()), [&](int task) { remember(attention_[task], layer, cache); });
    member.phase(static_cast<int>(attention_.size()) * model_.kv_heads, [&](int task) {
      attend_task(attention_[task / model_.kv_heads], task % model_.kv_heads, cache);
    });
    take_in_place(member, kO, index, scratch_.mixed, q_width);
    add_product(member, layer.o, kO, index, scratch_.mixed, q_width);
  }

  void feed_forward(Team::Member& member, const Layer& layer, int index) const {
    member.phase(step_.tokens, [&](int token) {
      float* x = scratch_.x + static_cast<int64_t>(token) * model_.hidden;
      normalise(step_.hidden + static_cast<int64_t>(token) * model_.hidden, layer.norm_mid, model_.hidden, model_.epsilon, x);
      for (SiteIndex site : {kGate, kUp}) take_in(site, index, token, x);
    });
    gated_product(member, layer, index);
    take_in_place(member, kDown, index, scratch_.inner, model_.inner);
    add_product(member, layer.down, kDown, index, scratch_.inner, model_.inner);
  }

  void head(Team::Member& member) const {
    // The wanted tokens move to the front of x.
    member.phase(step_.output_count, [&](int row) {
      normalise(step_.hidden + static_cast<int64_t>(step_.outputs[row]) * model_.hidden, model_.norm_out, model_.hidden,
                model_.epsilon, scratch_.x + static_cast<int64_t>(row) * model_.hidden);
    });
    const Part parts[] = {{&model_.head, scratch_.x, false, Site{}, Finish{}, model_.vocabulary, 0}};
    product<1>(member, parts, model_.hidden, step_.output_count,
               [&](int row, int offset, int count, const float* y) {
                 std::memcpy(step_.logits + static_cast<int64_t>(row) * model_.vocabulary + offset, y, count * sizeof(float));
               });
  }

  // Keys and values of some tokens go into the cache, keys and queries turned to their positions first.
  void remember(const AttentionTask& task, const Layer& layer, const Cache& cache) const {
    const Span& span = step_.spans[task.span];
    const int dim = model_.dim;
    for (int i = task.first; i < task.first + task.count; ++i) {
      const int64_t token = span.first + i;
      float* row = scratch_.qkv + token * qkv_width(model_);
      const float *cosines = step_.cosines + token * dim, *sines = step_.sines + token * dim;
      for (int head = 0; head < model_.heads + model_.kv_heads; ++head) {
        const float* weight = head < model_.heads ? layer.q_norm : layer.k_norm;
        if (weight) normalise(row + head * dim, weight, dim, model_.epsilon, row + head * dim);
        rotate(row + head * dim, cosines, sines, dim);
      }
      const int position = span.past + i, offset = position % cache.block;
      const int64_t number = step_.tables[span.table + position / cache.block];
      for (int head = 0; head < model_.kv_heads; ++head) {
        const float* key = row + (model_.heads + head) * dim;
        float* keys = cache.keys(number, head) + offset;
        for (int j = 0; j < dim; ++j) keys[static_cast<ptrdiff_t>(j) * cache.block] = key[j];
        std::memcpy(cache.values(number, head) + static_cast<ptrdiff_t>(offset) * dim,
                    row + (model_.heads + model_.kv_heads + head) * dim, dim * sizeof(float));
      }
    }
  }

  void attend_task(const AttentionTask& task, int head, const Cache& cache) const {
    const Span& span = step_.spans[task.span];
    const int shared = model_.heads / model_.kv_heads, rows = task.count * shared;
    for (int begin = 0; begin < rows; begin += kRows) {
      const int count = rows - begin < kRows ? rows - begin : kRows;
      Queries queries;
      for (int m = 0; m < count; ++m) {
        const int i = task.first + (begin + m) / shared;
        const int64_t token = span.first + i, offset = (head * shared + (begin + m) % shared) * model_.dim;
        queries.q[m] = scratch_.qkv + token * qkv_width(model_) + offset;
        queries.out[m] = scratch_.mixed + token * model_.heads * model_.dim + offset;
        queries.last[m] = span.past + i;
        queries.from[m] = model_.window && span.past + i >= model_.window ? span.past + i + 1 - model_.window : 0;
      }
      attend_rows(count, cache, step_.tables + span.table, head, queries, model_.scaling);
    }
  }

  bool used(SiteIndex site) const { return step_.adapters.used >> model_.sites[site] & 1; }

  Site at(SiteIndex site, int layer, int inputs) const {
    const int place = model_.sites[site];
    const int64_t before = static_cast<int64_t>(place) * step_.tokens * step_.adapters.max_rank;
    return {&step_.adapters, place * model_.layer_count + layer, inputs, step_.adapters.inner + before};
  }

  LayerFactors inputs(SiteIndex site, int layer) const {
    return LayerFactors(step_.scales.inputs[site], step_.scales.rows, layer);
  }

  Finish finish(SiteIndex site, int layer) const {
    return {LayerFactors(step_.scales.outputs[site], step_.scales.rows, layer),
            LayerFactors(step_.scales.shifts[site], step_.scales.rows, layer)};
  }

  // What a site reads of the x that it shares: q, k and v one, gate and up one.
  float* input_of(SiteIndex site) const {
    const int64_t place = site < kGate ? site - kQ : site - kGate, size = static_cast<int64_t>(step_.tokens) * model_.hidden;
    return step_.scales.inputs[site].values ? scratch_.own + place * size : scratch_.x;
  }

  Part part(const Matrix& matrix, SiteIndex site, int layer, int columns, int offset) const {
    return {&matrix, input_of(site), used(site), at(site, layer, matrix.inputs), finish(site, layer), columns,
            offset};
  }

  // A token's x goes into a site that shares it: scaled if the token's adapter wants that, and shrunk.
  void take_in(SiteIndex site, int layer, int token, const float* x) const {
    float* own = input_of(site) + static_cast<int64_t>(token) * model_.hidden;
    if (own != x) {
      if (const float* factors = inputs(site, layer).of(token))
        multiply(x, factors, model_.hidden, own);
      else
        std::memcpy(own, x, sizeof(float) * model_.hidden);
    }
    if (used(site)) shrink(at(site, layer, model_.hidden), token, own);
  }

  // The same for a site that has its input to itself.
  void take_in_place(Team::Member& member, SiteIndex site, int layer, float* x, int size) const {
    const LayerFactors factors = inputs(site, layer);
    if (!used(site) && !factors.values) return;
    member.phase(step_.tokens, [&](int token) {
      float* row = x + static_cast<int64_t>(token) * size;
      if (const float* found = factors.of(token)) multiply(row, found, size, row);
      if (used(site)) shrink(at(site, layer, size), token, row);
    });
  }

  static int group_of(int panels, int threads) { return panels >= 32 * threads ? 4 : panels >= 8 * threads ? 2 : 1; }

  // y = x W^T and the adapters' part, for parts whose x are alike; `put` takes a token's outputs of a panel.
  template <int N, class Put>
  void product(Team::Member& member, const Part (&parts)[N], int64_t stride, int tokens, Put put) const {
    int groups[N + 1] = {0}, sizes[N];
    for (int n = 0; n < N; ++n) {
      sizes[n] = group_of(parts[n].matrix->panel_count, step_.threads);
      groups[n + 1] = groups[n] + (parts[n].matrix->panel_count + sizes[n] - 1) / sizes[n];
    }
    member.phase(groups[N], [&](int task) {
      int n = 0;
      while (task >= groups[n + 1]) ++n;
      const Part& part = parts[n];
      const int first = (task - groups[n]) * sizes[n];
      const int last = first + sizes[n] < part.matrix->panel_count ? first + sizes[n] : part.matrix->panel_count;
      alignas(64) float y[kTokens * kPanel];
      for (int begin = 0; begin < tokens; begin += kTokens) {
        const int end = begin + kTokens < tokens ? begin + kTokens : tokens;
        Expectation expectation;
        if (part.adapted) expectation.want(part.site, begin, end, first, last - first);
        for (int panel = first; panel < last; ++panel) {
          panel_product(*part.matrix, panel, part.x + begin * stride, stride, end - begin, y, [&] { expectation.some(kExpected); });
          if (part.adapted) expand(part.site, begin, end, panel, y);
          const int columns = part.columns - panel * kPanel;
          part.finish.panel(begin, end, panel, columns, y);
          for (int token = begin; token < end; ++token)
            put(token, part.offset + panel * kPanel, columns < kPanel ? columns : kPanel, y + (token - begin) * kPanel);
        }
      }
    });
  }

  // hidden += x W^T and the adapters' part.
  void add_product(Team::Member& member, const Matrix& matrix, SiteIndex site, int layer, const float* x,
                   int64_t stride) const {
    const Part parts[] = {
        {&matrix, x, used(site), at(site, layer, matrix.inputs), finish(site, layer), model_.hidden, 0}};
    product<1>(member, parts, stride, step_.tokens, [&](int token, int offset, int count, const float* y) {
      float* to = step_.hidden + static_cast<int64_t>(token) * model_.hidden + offset;
      for (int i = 0; i < count; ++i) to[i] += y[i];
    });
  }

  // inner = silu(gate) * up, a panel of both at a time.
  void gated_product(Team::Member& member, const Layer& layer, int index) const {
    const Site gate = at(kGate, index, model_.hidden), up = at(kUp, index, model_.hidden);
    const Finish finish_gate = finish(kGate, index), finish_up = finish(kUp, index);
    const int panels = layer.gate.panel_count, size = group_of(panels, step_.threads);
    member.phase((panels + size - 1) / size, [&](int task) {
      const int first = task * size, last = first + size < panels ? first + size : panels;
      alignas(64) float left[kTokens * kPanel], right[kTokens * kPanel];
      for (int begin = 0; begin < step_.tokens; begin += kTokens) {
        const int end = begin + kTokens < step_.tokens ? begin + kTokens : step_.tokens;
        const float* gate_x = input_of(kGate) + static_cast<int64_t>(begin) * model_.hidden;
        const float* up_x = input_of(kUp) + static_cast<int64_t>(begin) * model_.hidden;
        Expectation expectation;
        if (used(kGate)) expectation.want(gate, begin, end, first, last - first);
        if (used(kUp)) expectation.want(up, begin, end, first, last - first);
        const auto between = [&] { expectation.some(kExpected); };
        for (int panel = first; panel < last; ++panel) {
          panel_product(layer.gate, panel, gate_x, model_.hidden, end - begin, left, between);
          if (used(kGate)) expand(gate, begin, end, panel, left);
          panel_product(layer.up, panel, up_x, model_.hidden, end - begin, right, between);
          if (used(kUp)) expand(up, begin, end, panel, right);
          const int columns = model_.inner - panel * kPanel, count = columns < kPanel ? columns : kPanel;
          finish_gate.panel(begin, end, panel, columns, left);
          finish_up.panel(begin, end, panel, columns, right);
          for (int token = begin; token < end; ++token) {
            float *g = left + (token - begin) * kPanel, *u = right + (token - begin) * kPanel;
            for (int i = 0; i < kPanel; i += kLanes) {
              const Vec value = load(g + i);
              store(g + i, value / (exponential(-value) + 1.0f) * load(u + i));
            }
            std::memcpy(scratch_.inner + static_cast<int64_t>(token) * model_.inner + panel * kPanel, g, count * sizeof(float));
          }
        }
      }
    });
  }

  // Copies: a thread that comes late may look at them after the caller has gone on.
  const Model model_;
  const std::vector<Layer> layers_;
  const Step step_;
  Scratch scratch_;
  std::vector<AttentionTask> attention_;
};

}  // namespace

extern "C" {

int32_t adaptermesh_panel() { return kPanel; }

int64_t adaptermesh_scratch_floats(const Model* model, int64_t tokens) {
  return tokens * ((1 + kOwn) * model->hidden + qkv_width(*model) + static_cast<int64_t>(model->heads) * model->dim + model->inner);
}

// from: [outputs, inputs] float32. to: [panels, inputs, kPanel] of the kind, the last panel filled up with zeros.
void adaptermesh_pack(const float* from, int64_t outputs, int64_t inputs, int32_t kind, void* to, int32_t threads) {
  const int panels = static_cast<int>((outputs + kPanel - 1) / kPanel);
  for_each(panels, threads, [=](int64_t panel) {
    for (int64_t k = 0; k < inputs; ++k)
      for (int i = 0; i < kPanel; ++i) {
        const int64_t row = panel * kPanel + i, start = (panel * inputs + k) * kPanel;
        const float value = row < outputs ? from[row * inputs + k] : 0.0f;
        if (kind == kFloat32) {
          static_cast<float*>(to)[start + i] = value;
        } else {
          uint32_t bits;
          std::memcpy(&bits, &value, sizeof(bits));
          static_cast<uint16_t*>(to)[start + place_of(i)] = static_cast<uint16_t>(bits >> 16);
        }
      }
  });
}

// y = x W^T without the bias. x: [count, inputs]. y: [count, outputs].
void adaptermesh_project(const Matrix* matrix, const float* x, int32_t count, float* y, int32_t outputs, int32_t threads) {
  Matrix bare = *matrix;
  bare.bias = nullptr;
  for_each(bare.panel_count, threads, [=](int panel) {
    alignas(64) float part[kTokens * kPanel];
    const int columns = outputs - panel * kPanel < kPanel ? outputs - panel * kPanel : kPanel;
    for (int begin = 0; begin < count; begin += kTokens) {
      const int rows = count - begin < kTokens ? count - begin : kTokens;
      const float* from = x + static_cast<int64_t>(begin) * bare.inputs;
      panel_product(bare, panel, from, bare.inputs, rows, part, [] {});
      for (int row = 0; row < rows; ++row)
        std::memcpy(y + static_cast<int64_t>(begin + row) * outputs + panel * kPanel, part + row * kPanel, columns * sizeof(float));
    }
  });
}

void adaptermesh_load(const Load* loads, int32_t count) {
  for (int32_t i = 0; i < count; ++i) load_module(loads[i]);
}

// y += s B (A x) at one site outside of a step; `index` is that of the site and layer in the tables. Rows of x and y
// are `x_stride` and `y_stride` floats apart. `inner` of the adapters: [tokens][max_rank].
void adaptermesh_add_lowrank(const Adapters* adapters, int32_t index, const float* x, int32_t inputs, int64_t x_stride,
                             float* y, int32_t outputs, int64_t y_stride, int32_t tokens, int32_t threads) {
  constexpr int kBlock = 4;
  const Site site{adapters, index, inputs, adapters->inner};
  for_each((tokens + kBlock - 1) / kBlock, threads, [=](int block) {
    const int begin = block * kBlock, end = begin + kBlock < tokens ? begin + kBlock : tokens;
    for (int token = begin; token < end; ++token) shrink(site, token, x + token * x_stride);
    for (int first = 0; first < outputs; first += kPanel) {
      alignas(64) float part[kBlock * kPanel] = {};
      expand(site, begin, end, first / kPanel, part);
      const int count = outputs - first < kPanel ? outputs - first : kPanel;
      for (int token = begin; token < end; ++token) {
        if (!site.rows(token)) continue;
        for (int i = 0; i < count; ++i) y[token * y_stride + first + i] += part[(token - begin) * kPanel + i];
      }
    }
  });
}

void adaptermesh_run(const Model* model, const Step* step) { Pool::shared().run(std::make_shared<Pass>(*model, *step)); }
}
