// Random batches through the kernels, for the sanitizers. Each token is compared with the plain formulas and, to
// the last bit, with the same token alone.

#include <atomic>
#include <cstdio>
#include <thread>

#include "world.h"

namespace {

// A step as a whole, or in some of its stages at a time, with what a caller could change between them left as it is.
void run(const Model& m, Step& step) {
  if (chance(0.5)) {
    step.last_layer = m.layer_count;
    step.last_stage = kStages;
    step.head = 1;
    adaptermesh_run(&m, &step);
    return;
  }
  step.moved = draw(0, (1 << kSites) - 1);
  step.apart = draw(0, (1 << kSites) - 1);
  for (int layer = 0; layer < m.layer_count; ++layer) {
    step.first_layer = layer;
    step.last_layer = layer + 1;
    for (int stage = 0; stage < kStages; stage = step.last_stage) {
      step.first_stage = stage;
      step.last_stage = draw(stage + 1, kStages);
      adaptermesh_run(&m, &step);
    }
  }
  step.first_layer = step.last_layer;
  step.head = 1;
  adaptermesh_run(&m, &step);
}

// A step of some tokens of some sequences; their logits go to the sequences.
void step(World& world, const std::vector<std::pair<Sequence*, int>>& rows, int threads, double wanted) {
  const Model& m = world.model;
  int tokens = 0;
  for (const auto& row : rows) tokens += row.second;
  Floats hidden, cosines, sines;
  std::vector<Span> spans;
  std::vector<int32_t> tables, outputs;
  std::vector<float*> places;
  Step step{};
  std::vector<const Rows*> adapters;
  std::vector<const Bottleneck*> beside;
  int first = 0;
  for (const auto& [sequence, count] : rows) {
    const int past = sequence->done;
    const auto cut = [&, s = sequence, n = count](const Floats& all, int width, Floats& to) {
      const auto from = all.begin() + static_cast<ptrdiff_t>(past) * width;
      to.insert(to.end(), from, from + static_cast<ptrdiff_t>(n) * width);
    };
    cut(sequence->hidden, m.hidden, hidden);
    cut(sequence->cosines, m.dim, cosines);
    cut(sequence->sines, m.dim, sines);
    spans.push_back({first, count, past, static_cast<int32_t>(tables.size())});
    const int blocks = (past + count + m.block - 1) / m.block;
    tables.insert(tables.end(), sequence->blocks.begin(), sequence->blocks.begin() + blocks);
    for (int i = 0; i < count; ++i) {
      if (chance(wanted)) {
        outputs.push_back(first + i);
        places.push_back(sequence->logits.data() + static_cast<size_t>(past + i) * m.vocabulary);
      }
      const Adapter* adapter = sequence->adapter < 0 ? nullptr : &world.adapters[sequence->adapter];
      adapters.push_back(adapter ? adapter->table.data() : nullptr);
      beside.push_back(adapter ? adapter->beside.data() : nullptr);
      if (!adapter) continue;
      step.bottlenecks.used |= adapter->used_blocks;
      step.bottlenecks.max_width = std::max(step.bottlenecks.max_width, adapter->widest);
      step.adapters.used |= adapter->used;
      step.adapters.max_rank = std::max(step.adapters.max_rank, adapter->most);
    }
    sequence->done += count;
    first += count;
  }
  Raw<float> inner(static_cast<size_t>(kSites) * tokens * step.adapters.max_rank);
  step.adapters.tables = adapters.data();
  step.adapters.inner = inner.data;
  Raw<float> narrowed(static_cast<size_t>(kBlocks) * tokens * step.bottlenecks.max_width);
  step.bottlenecks.tables = beside.data();
  step.bottlenecks.inner = narrowed.data;
  Raw<float> scratch(adaptermesh_scratch_floats(&m, tokens));
  Raw<float> logits(outputs.size() * m.vocabulary);
  step.hidden = hidden.data();
  step.cosines = cosines.data();
  step.sines = sines.data();
  step.spans = spans.data();
  step.tables = tables.data();
  step.outputs = outputs.data();
  step.logits = logits.data;
  step.scratch = scratch.data;
  step.tokens = tokens;
  step.span_count = static_cast<int32_t>(spans.size());
  step.output_count = static_cast<int32_t>(outputs.size());
  step.threads = threads;
  run(m, step);
  for (size_t row = 0; row < outputs.size(); ++row)
    std::memcpy(places[row], logits.data + row * m.vocabulary, m.vocabulary * sizeof(float));
}

int fail(const char* what, int seed) {
  std::printf("seed %d: %s\n", seed, what);
  return 1;
}

int check(int seed, int longest) {
  engine.seed(seed);
  World world;
  const Model& m = world.model;
  std::vector<int32_t> free(kBlocksOfAll);
  for (int block = 0; block < kBlocksOfAll; ++block) free[block] = block;
  std::shuffle(free.begin(), free.end(), engine);
  std::vector<Sequence> sequences(draw(1, 5));
  for (Sequence& one : sequences) {
    one.adapter = draw(-1, static_cast<int>(world.adapters.size()) - 1);
    one.length = draw(1, chance(0.1) ? longest : 40);
    one.hidden = random_floats(static_cast<size_t>(one.length) * m.hidden, 1.0f);
    one.cosines = random_floats(static_cast<size_t>(one.length) * m.dim, 0.7f);
    one.sines = random_floats(static_cast<size_t>(one.length) * m.dim, 0.7f);
    one.logits.assign(static_cast<size_t>(one.length) * m.vocabulary, NAN);
    int blocks = (one.length + m.block - 1) / m.block;
    if (blocks > static_cast<int>(free.size())) {
      blocks = static_cast<int>(free.size());
      one.length = std::min(one.length, blocks * m.block);
    }
    one.blocks.assign(free.end() - blocks, free.end());
    free.resize(free.size() - blocks);
  }
  std::vector<Sequence> alone = sequences;
  world.fresh_cache();
  for (;;) {
    std::vector<std::pair<Sequence*, int>> rows;
    for (Sequence& one : sequences)
      if (one.done < one.length && chance(0.7))
        rows.emplace_back(&one, std::min(one.length - one.done, chance(0.5) ? 1 : draw(1, 150)));
    std::shuffle(rows.begin(), rows.end(), engine);
    if (!rows.empty()) step(world, rows, draw(1, 4), 1.0);
    bool left = false;
    for (Sequence& one : sequences) left |= one.done < one.length;
    if (!left) break;
  }
  world.fresh_cache();
  double worst = 0;
  for (size_t index = 0; index < sequences.size(); ++index) {
    Sequence& one = alone[index];
    const bool whole = chance(0.5);
    while (one.done < one.length) step(world, {{&one, whole ? one.length : 1}}, 1, 1.0);
    const Sequence& mixed = sequences[index];
    const size_t count = static_cast<size_t>(one.length) * m.vocabulary;
    for (size_t i = 0; i < count; ++i)
      if (!(one.logits[i] == mixed.logits[i])) return fail("a row is not what it is alone", seed);
    const Doubles expected = plainly(world, one);
    for (size_t i = 0; i < count; ++i)
      worst = std::max(worst, std::abs(expected[i] - one.logits[i]) / (1 + std::abs(expected[i])));
    if (!(worst < 1e-4)) return fail("a row is not what the formula says", seed);
  }
  std::vector<std::pair<Sequence*, int>> again;
  for (Sequence& one : alone) {
    one.done = one.length - 1;
    again.emplace_back(&one, 1);
  }
  step(world, again, 2, 0.0);  // no logits are wanted
  return 0;
}

}  // namespace

// Arguments: how many worlds, and how long their longest sequences may be. Two are computed at a time: the kernels'
// threads serve whoever asks.
int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]), longest = std::atoi(arguments[2]);
  std::atomic<int> next{0}, failed{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller)
    callers.emplace_back([&] {
      for (int seed; (seed = next++) < count;) failed += check(seed, longest);
    });
  for (std::thread& caller : callers) caller.join();
  return failed ? 1 : 0;
}
