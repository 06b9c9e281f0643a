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

// Writes the decision that `walk` stands before; `left`: the leaves that the ranks before the decision's leave.
void append_decision(const RowWalk& walk, const Trie& trie, const bits::Word* left, EncodedBatch& out) {
  std::int32_t last = Trie::kNone;
  const auto close_branch = [&] {
    if (last == Trie::kNone) return;
    const auto size = static_cast<std::int64_t>(out.below_items.size());
    if (size - out.below_offsets.back() > 1) {
      const auto begin = out.below_items.begin() + static_cast<std::ptrdiff_t>(out.below_offsets.back());
      std::sort(begin, out.below_items.end());
      out.below_items.erase(std::unique(begin, out.below_items.end()), out.below_items.end());
    }
    out.below_offsets.push_back(static_cast<std::int64_t>(out.below_items.size()));
  };
  walk.for_each_branch([&](std::int32_t id, std::int32_t low, std::int32_t high) {
    if (id != last) {
      close_branch();
      out.allowed_ids.push_back(id);
      last = id;
    }
    bits::for_each(left, low, high, [&](std::int32_t leaf) { out.below_items.push_back(trie.candidate(leaf)); });
    return true;
  });
  close_branch();
  out.allowed_offsets.push_back(static_cast<std::int64_t>(out.allowed_ids.size()));
}

[[noreturn]] void throw_misread(std::int64_t row, std::int32_t rank) {
  throw std::invalid_argument("rankings: row " + std::to_string(row) +
                              " is spelled as another ranking is, which has a longer candidate at rank " +
                              std::to_string(rank) + " and is what its tokens are read as: choose another separator");
}

// What spelling a row needs, used again for the next.
struct Scratch {
  explicit Scratch(const RankingGrammar& grammar)
      : remaining(static_cast<std::size_t>(bits::words_for(grammar.max_num_candidates()))),
        left(remaining),
        placed(static_cast<std::size_t>(grammar.max_num_ranked())) {}

  std::vector<bits::Word> remaining;
  std::vector<bits::Word> left;
  std::vector<std::int32_t> placed;
  std::vector<Reading> others;
};

// Spells one row at the end of `out`.
void append_row(const RankingGrammar& grammar, std::int64_t row, const std::int64_t* ranking, bool with_allowed,
                Scratch& scratch, EncodedBatch& out) {
  const Trie& trie = grammar.trie(row);
  const std::int32_t num_ranked = grammar.num_ranked(row);
  Cursor cursor;
  RowWalk walk(grammar, row, cursor, scratch.remaining.data(), scratch.placed.data(), scratch.others);
  walk.restart();
  // Of equal candidates the walk places the first, `ranking` any of them: `left` goes by the ranking.
  bits::Word* const left = scratch.left.data();
  bits::insert_all(left, trie.num_candidates());
  std::int32_t num_certain = 0;
  const auto leaf_at = [&](std::int32_t rank) { return trie.leaf(static_cast<std::int32_t>(ranking[rank])); };
  const auto spell = [&](const std::int32_t* begin, const std::int32_t* end, std::int32_t item_id) {
    for (const std::int32_t* token = begin; token != end; ++token) {
      if (walk.only_token() == Trie::kNone) {
        for (; num_certain < walk.num_certain(); ++num_certain) bits::erase(left, leaf_at(num_certain));
        if (with_allowed) append_decision(walk, trie, left, out);
        out.decision_rows.push_back(static_cast<std::int32_t>(row));
        out.decision_positions.push_back(cursor.step);
        out.decision_ranks.push_back(num_certain);
        out.targets.push_back(*token);
      }
      if (!walk.advance(*token)) throw_misread(row, walk.num_certain());
      out.tokens.push_back(*token);
      out.item_ids.push_back(item_id);
    }
  };
  const CandidateTokens& candidates = grammar.tries().candidates();
  const std::int64_t* offsets = candidates.offsets_of(grammar.list(row));
  for (std::int32_t rank = 0; rank < num_ranked; ++rank) {
    const std::int32_t* const tokens = candidates.tokens.data();
    spell(tokens + offsets[ranking[rank]], tokens + offsets[ranking[rank] + 1], rank);
    const std::vector<std::int32_t>& tail = rank + 1 < num_ranked ? grammar.separator() : grammar.end();
    spell(tail.data(), tail.data() + tail.size(), -1);
  }
  walk.finish();
  for (std::int32_t rank = 0; rank < num_ranked; ++rank) {
    const std::int32_t leaf = leaf_at(rank);
    const std::int32_t read = scratch.placed[static_cast<std::size_t>(rank)];
    if (read != leaf && trie.equal_leaves(read) != trie.equal_leaves(leaf)) throw_misread(row, rank);
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
  grammar.check_end_is_certain();
  check_rankings(grammar, rankings, width);
  const std::int64_t num_rows = grammar.num_rows();
  const std::int64_t num_chunks = std::max<std::int64_t>(1, (num_rows + kRowsPerChunk - 1) / kRowsPerChunk);
  const std::int64_t cost = num_rows * grammar.max_num_ranked() * (50 + 2 * grammar.max_num_candidates());
  std::vector<EncodedBatch> chunks(static_cast<std::size_t>(num_chunks));
  parallel_for(num_chunks, cost, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(grammar);
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t last_row = std::min(num_rows, (chunk + 1) * kRowsPerChunk);
      for (std::int64_t row = chunk * kRowsPerChunk; row < last_row; ++row) {
        append_row(grammar, row, rankings + row * width, with_allowed, scratch,
                   chunks[static_cast<std::size_t>(chunk)]);
      }
    }
  });
  return concatenated(std::move(chunks));
}

}  // namespace flexrec
