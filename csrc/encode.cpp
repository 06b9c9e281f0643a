#include "flexrec/encode.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "flexrec/cursor.hpp"
#include "flexrec/parallel.hpp"
#include "flexrec/permutation.hpp"

namespace flexrec {

namespace {

// Enough rows to repay a thread, few enough for many threads.
constexpr std::int64_t kRowsPerChunk = 128;

// Writes the decision that `walk` stands before, if it is one.
void append_decision(const RowWalk& walk, const Trie& trie, const bits::Word* remaining, EncodedBatch& out) {
  walk.for_each_allowed([&](std::int32_t id, std::int32_t low, std::int32_t high) {
    const auto first_below = static_cast<std::ptrdiff_t>(out.below_items.size());
    bits::for_each(remaining, low, high, [&](std::int32_t leaf) { out.below_items.push_back(trie.candidate(leaf)); });
    if (high - low > 1) std::sort(out.below_items.begin() + first_below, out.below_items.end());
    out.below_offsets.push_back(static_cast<std::int64_t>(out.below_items.size()));
    out.allowed_ids.push_back(id);
    return true;
  });
  out.allowed_offsets.push_back(static_cast<std::int64_t>(out.allowed_ids.size()));
}

// Spells one row at the end of `out`.
void append_row(const RankingGrammar& grammar, std::int64_t row, const std::int64_t* ranking, bool with_allowed,
                bits::Word* remaining, EncodedBatch& out) {
  const Trie& trie = grammar.trie(row);
  Cursor cursor;
  RowWalk walk(grammar, row, cursor, remaining);
  walk.restart();
  while (!walk.done()) {
    const std::int32_t rank = cursor.rank;
    // Once all items are placed only the end is left to spell.
    const std::int32_t leaf =
        rank < grammar.num_ranked(row) ? trie.leaf(static_cast<std::int32_t>(ranking[rank])) : Trie::kNone;
    const std::int32_t token = walk.token_towards(leaf);
    if (walk.only_token() == Trie::kNone) {
      if (with_allowed) append_decision(walk, trie, remaining, out);
      out.decision_rows.push_back(static_cast<std::int32_t>(row));
      out.decision_positions.push_back(cursor.step);
      out.decision_ranks.push_back(rank);
      out.targets.push_back(token);
    }
    const RowWalk::Step step = walk.advance(token, nullptr, leaf);
    out.tokens.push_back(token);
    out.item_ids.push_back(step == RowWalk::Step::kItem ? rank : -1);
  }
  out.offsets.push_back(static_cast<std::int64_t>(out.tokens.size()));
}

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

// Offsets begin with 0, those of `from` count from the end of what `to` describes.
void append_offsets(std::vector<std::int64_t>& to, const std::vector<std::int64_t>& from) {
  const std::int64_t shift = to.back();
  std::transform(from.begin() + 1, from.end(), std::back_inserter(to), [&](std::int64_t at) { return at + shift; });
}

EncodedBatch concatenated(std::vector<EncodedBatch>&& chunks) {
  EncodedBatch result = std::move(chunks.front());
  for (std::size_t i = 1; i < chunks.size(); ++i) {
    const EncodedBatch chunk = std::move(chunks[i]);
    append(result.tokens, chunk.tokens);
    append_offsets(result.offsets, chunk.offsets);
    append(result.item_ids, chunk.item_ids);
    append(result.decision_rows, chunk.decision_rows);
    append(result.decision_positions, chunk.decision_positions);
    append(result.decision_ranks, chunk.decision_ranks);
    append(result.targets, chunk.targets);
    append(result.allowed_ids, chunk.allowed_ids);
    append_offsets(result.allowed_offsets, chunk.allowed_offsets);
    append(result.below_items, chunk.below_items);
    append_offsets(result.below_offsets, chunk.below_offsets);
  }
  return result;
}

void check_rankings(const RankingGrammar& grammar, const std::int64_t* rankings, std::int64_t width) {
  std::vector<std::int64_t> num_candidates(static_cast<std::size_t>(grammar.num_rows()));
  for (std::int64_t row = 0; row < grammar.num_rows(); ++row) {
    num_candidates[static_cast<std::size_t>(row)] = grammar.trie(row).num_candidates();
  }
  inverse_permutations(rankings, grammar.num_rows(), width, num_candidates);  // throws where one is none
  for (std::int64_t row = 0; row < grammar.num_rows(); ++row) {
    const std::int64_t* ranking = rankings + row * width;
    const std::int64_t count = std::find(ranking, ranking + width, -1) - ranking;
    if (count != grammar.num_ranked(row)) {
      throw std::invalid_argument("rankings: row " + std::to_string(row) + " ranks " + std::to_string(count) +
                                  " items, expected " + std::to_string(grammar.num_ranked(row)) + " (of " +
                                  std::to_string(grammar.trie(row).num_candidates()) + " candidates; see num_ranked)");
    }
  }
}

}  // namespace

EncodedBatch encode_rankings(const RankingGrammar& grammar, const std::int64_t* rankings, std::int64_t width,
                             bool with_allowed) {
  check_rankings(grammar, rankings, width);
  const std::int64_t num_rows = grammar.num_rows();
  const std::int64_t num_chunks = std::max<std::int64_t>(1, (num_rows + kRowsPerChunk - 1) / kRowsPerChunk);
  const std::int64_t cost = num_rows * grammar.max_num_ranked() * (50 + 2 * grammar.max_num_candidates());
  std::vector<EncodedBatch> chunks(static_cast<std::size_t>(num_chunks));
  parallel_for(num_chunks, cost, [&](std::int64_t begin, std::int64_t end) {
    std::vector<bits::Word> remaining(static_cast<std::size_t>(bits::words_for(grammar.max_num_candidates())));
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t last_row = std::min(num_rows, (chunk + 1) * kRowsPerChunk);
      for (std::int64_t row = chunk * kRowsPerChunk; row < last_row; ++row) {
        append_row(grammar, row, rankings + row * width, with_allowed, remaining.data(),
                   chunks[static_cast<std::size_t>(chunk)]);
      }
    }
  });
  return concatenated(std::move(chunks));
}

}  // namespace flexrec
