// One step of a decoder of the Llama family on a CPU: all layers in one call, adapters and paged attention in place.
//
// A call may also be some stages of one layer: what an adapter wants that is not known here, the caller does to the
// scratch memory between two calls.
//
// The structures are mirrored in library.py. All arrays belong to the caller; nothing is kept between calls.

#include "attention.h"
#include "bottleneck.h"
#include "lowrank.h"
#include "product.h"
#include "scales.h"
#include "team.h"

enum SiteIndex { kQ, kK, kV, kO, kGate, kUp, kDown, kSites };
enum BlockIndex { kAttention, kFeedForward, kBlocks };

// What a layer consists of, in this order. Before a product its sites' inputs lie in Scratch, after it their outputs.
enum Stage {
  kTakeQkv,
  kProductQkv,
  kAttend,
  kProductO,
  kJoinAttention,
  kTakeGated,
  kProductGated,
  kActivate,
  kProductDown,
  kJoinFeedForward,
  kStages
};

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
  Bottlenecks bottlenecks;
  int32_t tokens;
  int32_t span_count;
  int32_t output_count;
  int32_t first_layer;
  int32_t last_layer;  // exclusive
  int32_t threads;
  int32_t first_stage;  // of each layer; all but 0 and kStages stand for one layer
  int32_t last_stage;   // exclusive
  int32_t moved;        // bit n: the caller changes what goes into site n, between two stages
  int32_t apart;        // bit n: the caller changes what comes out of site n
  int32_t head;         // whether the logits are computed after that
};

// Where a step's intermediate values lie in its scratch memory.
struct Scratch {
  float* x;      // [tokens, hidden]: what a sub-layer reads; later what it puts out, where that is wanted apart
  float* own;    // [kOwn][tokens, hidden]: x as the adapters want it for one site
  float* qkv;    // [tokens, (heads + 2 * kv_heads) * dim]
  float* mixed;  // [tokens, heads * dim]
  float* inner;  // [tokens, inner]
  float* upper;  // [tokens, inner]: of `up`, where that is wanted apart
};

namespace {

constexpr int kPhasesOfLayer = 20;
constexpr int kPhasesOfHead = 2;
constexpr int kExpected = 24;     // cache lines of B that are asked for after each tile of the base's product
constexpr int kOwn = 3;           // sites that may read one x, each with factors of its own
constexpr int kQueryTokens = 16;  // tokens of a prompt that one task attends for

int64_t qkv_width(const Model& model) { return static_cast<int64_t>(model.heads + 2 * model.kv_heads) * model.dim; }

Scratch lay_out(const Model& model, int64_t tokens, float* memory) {
  Scratch found;
  found.x = memory;
  found.own = found.x + tokens * model.hidden;
  found.qkv = found.own + kOwn * tokens * model.hidden;
  found.mixed = found.qkv + tokens * qkv_width(model);
  found.inner = found.mixed + tokens * model.heads * model.dim;
  found.upper = found.inner + tokens * model.inner;
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
    for (int index = step_.first_layer; index < step_.last_layer; ++index)
      for (int stage = step_.first_stage; stage < step_.last_stage; ++stage) run_stage(member, index, stage);
    if (step_.head) head(member);
  }

 private:
  void run_stage(Team::Member& member, int index, int stage) const {
    const Layer& layer = layers_[index];
    switch (stage) {
      case kTakeQkv: return take(member, index, layer.norm_in, kAttention, {kQ, kK, kV});
      case kProductQkv: return qkv_product(member, layer, index);
      case kAttend: return attend(member, layer, index);
      case kProductO: return add_product(member, layer.o, kO, index, scratch_.mixed, model_.heads * model_.dim);
      case kJoinAttention: return join(member, kO, index);
      case kTakeGated: return take(member, index, layer.norm_mid, kFeedForward, {kGate, kUp});
      case kProductGated: return gated_product(member, layer, index);
      case kActivate: return activate_apart(member, index);
      case kProductDown: return add_product(member, layer.down, kDown, index, scratch_.inner, model_.inner);
      case kJoinFeedForward: return join(member, kDown, index);
    }
  }

  // A sub-layer's x, and what its sites and its block make of it before their products.
  void take(Team::Member& member, int index, const float* norm, BlockIndex block,
            std::initializer_list<SiteIndex> sites) const {
    const BlockSite beside = block_at(block, index);
    member.phase(step_.tokens, [&](int token) {
      const float* stream = step_.hidden + static_cast<int64_t>(token) * model_.hidden;
      float* x = scratch_.x + static_cast<int64_t>(token) * model_.hidden;
      if (const Bottleneck* found = bottleneck(beside, block, token); found && found->input == kResidual)
        narrow(beside, token, *found, stream);
      normalise(stream, norm, model_.hidden, model_.epsilon, x);
      for (SiteIndex site : sites) take_in(site, index, token, x);
    });
  }

  // The A of sites whose inputs the caller has changed.
  void shrink_moved(Team::Member& member, int index, std::initializer_list<SiteIndex> sites) const {
    bool any = false;
    for (SiteIndex site : sites) any = any || (is(step_.moved, site) && used(site));
    if (!any) return;
    member.phase(step_.tokens, [&](int token) {
      for (SiteIndex site : sites)
        if (is(step_.moved, site) && used(site))
          shrink(at(site, index, model_.hidden), token, input_of(site) + static_cast<int64_t>(token) * model_.hidden);
    });
  }

  void qkv_product(Team::Member& member, const Layer& layer, int index) const {
    const int q_width = model_.heads * model_.dim, kv_width = model_.kv_heads * model_.dim;
    const int64_t width = qkv_width(model_);
    shrink_moved(member, index, {kQ, kK, kV});
    const Part parts[] = {part(layer.q, kQ, index, q_width, 0),
                          part(layer.k, kK, index, kv_width, q_width),
                          part(layer.v, kV, index, kv_width, q_width + kv_width)};
    product<3>(member, parts, model_.hidden, step_.tokens,
               [&](int token, int offset, int count, const float* y) {
                 std::memcpy(scratch_.qkv + token * width + offset, y, count * sizeof(float));
               });
  }

  void attend(Team::Member& member, const Layer& layer, int index) const {
    const Cache cache{layer.cache, model_.block, model_.kv_heads, model_.dim};
    member.phase(static_cast<int>(attention_.size()), [&](int task) { remember(attention_[task], layer, cache); });
    member.phase(static_cast<int>(attention_.size()) * model_.kv_heads, [&](int task) {
      attend_task(attention_[task / model_.kv_heads], task % model_.kv_heads, cache);
    });
    scale_moved(member, kO, index, scratch_.mixed, model_.heads * model_.dim);
  }

  // What a sub-layer put out joins the stream, if it has not yet, and its block's bottlenecks come to it.
  void join(Team::Member& member, SiteIndex site, int index) const {
    const BlockIndex block = site == kO ? kAttention : kFeedForward;
    const bool apart = is(step_.apart, site), adapted = step_.bottlenecks.used >> block & 1;
    if (!apart && !adapted) return;
    const BlockSite beside = block_at(block, index);
    member.phase(step_.tokens, [&](int token) {
      float* stream = step_.hidden + static_cast<int64_t>(token) * model_.hidden;
      const float* output = scratch_.x + static_cast<int64_t>(token) * model_.hidden;
      if (apart) add(output, model_.hidden, stream);
      const Bottleneck* found = bottleneck(beside, block, token);
      if (found && found->input != kResidual) narrow(beside, token, *found, found->input == kSum ? stream : output);
    });
    if (!adapted) return;
    const int panels = (model_.hidden + kPanel - 1) / kPanel, size = group_of(panels, step_.threads);
    member.phase((panels + size - 1) / size, [&](int task) {
      const int first = task * size, last = first + size < panels ? first + size : panels;
      for (int begin = 0; begin < step_.tokens; begin += kTokens) {
        const int end = begin + kTokens < step_.tokens ? begin + kTokens : step_.tokens;
        for (int panel = first; panel < last; ++panel)
          widen(beside, begin, end, panel, model_.hidden, step_.hidden, model_.hidden);
      }
    });
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

  static bool is(int32_t bits, SiteIndex site) { return bits >> site & 1; }

  bool used(SiteIndex site) const { return step_.adapters.used >> model_.sites[site] & 1; }

  BlockSite block_at(BlockIndex block, int layer) const {
    const Bottlenecks& held = step_.bottlenecks;
    const int64_t before = static_cast<int64_t>(block) * step_.tokens * held.max_width;
    return {&held, block * model_.layer_count + layer, model_.hidden, held.inner + before};
  }

  const Bottleneck* bottleneck(const BlockSite& beside, BlockIndex block, int token) const {
    return step_.bottlenecks.used >> block & 1 ? beside.of(token) : nullptr;
  }

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
    const bool shared = !step_.scales.inputs[site].values && !is(step_.moved, site);
    return shared ? scratch_.x : scratch_.own + place * size;
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
    if (used(site) && !is(step_.moved, site)) shrink(at(site, layer, model_.hidden), token, own);
  }

  // The same for a site that has its input to itself.
  void take_in_place(Team::Member& member, SiteIndex site, int layer, float* x, int size) const {
    const LayerFactors factors = is(step_.moved, site) ? LayerFactors() : inputs(site, layer);
    if (!used(site) && !factors.values) return;
    member.phase(step_.tokens, [&](int token) {
      float* row = x + static_cast<int64_t>(token) * size;
      if (const float* found = factors.of(token)) multiply(row, found, size, row);
      if (used(site)) shrink(at(site, layer, size), token, row);
    });
  }

  // The factors alone, before the caller changes such an input.
  void scale_moved(Team::Member& member, SiteIndex site, int layer, float* x, int size) const {
    const LayerFactors factors = inputs(site, layer);
    if (!is(step_.moved, site) || !factors.values) return;
    member.phase(step_.tokens, [&](int token) {
      float* row = x + static_cast<int64_t>(token) * size;
      if (const float* found = factors.of(token)) multiply(row, found, size, row);
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

  // hidden += x W^T and the adapters' part; or Scratch::x takes that, for all tokens or those whose bottleneck reads it.
  void add_product(Team::Member& member, const Matrix& matrix, SiteIndex site, int layer, float* x, int stride) const {
    take_in_place(member, site, layer, x, stride);
    const Part parts[] = {
        {&matrix, x, used(site), at(site, layer, matrix.inputs), finish(site, layer), model_.hidden, 0}};
    const BlockIndex block = site == kO ? kAttention : kFeedForward;
    const BlockSite beside = block_at(block, layer);
    const bool apart = is(step_.apart, site);
    product<1>(member, parts, stride, step_.tokens, [&](int token, int offset, int count, const float* y) {
      const int64_t start = static_cast<int64_t>(token) * model_.hidden + offset;
      const Bottleneck* found = bottleneck(beside, block, token);
      if (apart || (found && found->input == kOutput)) std::memcpy(scratch_.x + start, y, count * sizeof(float));
      if (apart) return;
      float* to = step_.hidden + start;
      for (int i = 0; i < count; ++i) to[i] += y[i];
    });
  }

  bool gates_apart() const { return is(step_.apart, kGate) || is(step_.apart, kUp); }

  // inner = silu(gate) * up, where these two were wanted apart.
  void activate_apart(Team::Member& member, int index) const {
    if (gates_apart())
      member.phase(step_.tokens, [&](int token) {
        const int64_t start = static_cast<int64_t>(token) * model_.inner;
        gate_row(scratch_.inner + start, scratch_.upper + start, model_.inner);
      });
    scale_moved(member, kDown, index, scratch_.inner, model_.inner);
  }

  // gate = silu(gate) * up.
  static void gate_row(float* gate, const float* up, int count) {
    const auto some = [](float* to, const float* other) {
      const Vec value = load(to);
      store(to, value / (exponential(-value) + 1.0f) * load(other));
    };
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) some(gate + i, up + i);
    if (i == count) return;
    // The rest by the same arithmetic, so that it is the same to the last bit as within a panel.
    alignas(64) float rest[kLanes] = {}, other[kLanes] = {};
    std::memcpy(rest, gate + i, (count - i) * sizeof(float));
    std::memcpy(other, up + i, (count - i) * sizeof(float));
    some(rest, other);
    std::memcpy(gate + i, rest, (count - i) * sizeof(float));
  }

  // inner = silu(gate) * up, a panel of both at a time; apart: inner = gate, upper = up.
  void gated_product(Team::Member& member, const Layer& layer, int index) const {
    shrink_moved(member, index, {kGate, kUp});
    const bool apart = gates_apart();
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
            const int64_t start = static_cast<int64_t>(token) * model_.inner + panel * kPanel;
            if (apart)
              std::memcpy(scratch_.upper + start, u, count * sizeof(float));
            else
              gate_row(g, u, kPanel);
            std::memcpy(scratch_.inner + start, g, count * sizeof(float));
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
  return tokens * ((1 + kOwn) * model->hidden + qkv_width(*model) + static_cast<int64_t>(model->heads) * model->dim +
                   2 * static_cast<int64_t>(model->inner));
}

// Where the parts of such memory are.
void adaptermesh_lay_out(const Model* model, int64_t tokens, float* memory, Scratch* found) {
  *found = lay_out(*model, tokens, memory);
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

// y += s (up act(down v + b) + c) at one block outside of a step; rows of tokens without one are left alone. `index` is
// that of the block and layer in the tables, `v` holds what each token's bottleneck reads. v, y: [tokens, hidden].
void adaptermesh_add_bottleneck(const Bottlenecks* bottlenecks, int32_t index, const float* v, float* y, int32_t hidden,
                                int32_t tokens, int32_t threads) {
  constexpr int kBlock = 4;
  const BlockSite site{bottlenecks, index, hidden, bottlenecks->inner};
  for_each((tokens + kBlock - 1) / kBlock, threads, [=](int block) {
    const int begin = block * kBlock, end = begin + kBlock < tokens ? begin + kBlock : tokens;
    for (int token = begin; token < end; ++token)
      if (const Bottleneck* found = site.of(token)) narrow(site, token, *found, v + static_cast<int64_t>(token) * hidden);
    for (int first = 0; first < hidden; first += kPanel) widen(site, begin, end, first / kPanel, hidden, y, hidden);
  });
}

void adaptermesh_run(const Model* model, const Step* step) { Pool::shared().run(std::make_shared<Pass>(*model, *step)); }
}
