#include "flexrec/encode.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "flexrec/cursor.hpp"
#include "flexrec/parallel.hpp"
#include "flexrec/permutation.hpp"

namespace flexrec {

namespace {

// How far each of the result's arrays is filled.
struct Position {
  std::int64_t tokens = 0;
  std::int64_t decisions = 0;
  std::int64_t allowed = 0;
  std::int64_t below = 0;
};

Position operator+(const Position& a, const Position& b) {
  return {a.tokens + b.tokens, a.decisions + b.decisions, a.allowed + b.allowed, a.below + b.below};
}

// Spells one row from position `at` on, which it moves; `out` is null where only the sizes are wanted.
void encode_row(const RankingGrammar& grammar, std::int64_t row, const std::int64_t* ranking, bits::Word* remaining,
                Position& at, EncodedBatch* out) {
  const Trie& trie = grammar.trie(row);
  const std::int64_t row_begin = at.tokens;
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
      walk.for_each_allowed([&](std::int32_t id, std::int32_t low, std::int32_t high) {
        const std::int64_t first_below = at.below;
        bits::for_each(remaining, low, high, [&](std::int32_t below) {
          if (out != nullptr) out->below_items[static_cast<std::size_t>(at.below)] = trie.candidate(below);
          ++at.below;
        });
        if (out != nullptr) {
          if (high - low > 1) std::sort(out->below_items.begin() + first_below, out->below_items.begin() + at.below);
          out->allowed_ids[static_cast<std::size_t>(at.allowed)] = id;
          out->below_offsets[static_cast<std::size_t>(at.allowed) + 1] = at.below;
        }
        ++at.allowed;
        return true;
      });
      if (out != nullptr) {
        const auto decision = static_cast<std::size_t>(at.decisions);
        out->decision_rows[decision] = static_cast<std::int32_t>(row);
        out->decision_positions[decision] = static_cast<std::int32_t>(at.tokens - row_begin);
        out->decision_ranks[decision] = rank;
        out->targets[decision] = token;
        out->allowed_offsets[decision + 1] = at.allowed;
      }
      ++at.decisions;
    }

    const RowWalk::Step step = walk.advance(token, nullptr, leaf);
    if (out != nullptr) {
      out->tokens[static_cast<std::size_t>(at.tokens)] = token;
      out->item_ids[static_cast<std::size_t>(at.tokens)] = step == RowWalk::Step::kItem ? rank : -1;
    }
    ++at.tokens;
  }
}

void check_rankings(const RankingGrammar& grammar, const std::int64_t* rankings, std::int64_t width) {
  std::vector<std::int64_t> num_candidates(static_cast<std::size_t>(grammar.num_rows()));
  for (std::int64_t row = 0; row < grammar.num_rows(); ++row) {
    num_candidates[static_cast<std::size_t>(row)] = grammar.trie(row).num_candidates();
  }
  check_permutations(rankings, grammar.num_rows(), width, num_candidates);
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

EncodedBatch encode_rankings(const RankingGrammar& grammar, const std::int64_t* rankings, std::int64_t width) {
  check_rankings(grammar, rankings, width);
  const std::int64_t num_rows = grammar.num_rows();
  const std::int64_t cost = num_rows * grammar.max_num_ranked() * (50 + 2 * grammar.max_num_candidates());
  // starts[row] is where the row begins in every array; the rows are spelled once to know their sizes, once to write.
  std::vector<Position> starts(static_cast<std::size_t>(num_rows) + 1);
  const auto encode_all = [&](EncodedBatch* out) {
    parallel_for(num_rows, cost, [&](std::int64_t begin, std::int64_t end) {
      std::vector<bits::Word> remaining(static_cast<std::size_t>(bits::words_for(grammar.max_num_candidates())));
      for (std::int64_t row = begin; row < end; ++row) {
        Position at = out == nullptr ? Position{} : starts[static_cast<std::size_t>(row)];
        encode_row(grammar, row, rankings + row * width, remaining.data(), at, out);
        if (out == nullptr) starts[static_cast<std::size_t>(row) + 1] = at;
      }
    });
  };
  encode_all(nullptr);
  for (std::size_t row = 1; row < starts.size(); ++row) starts[row] = starts[row - 1] + starts[row];

  const Position total = starts.back();
  EncodedBatch result;
  result.tokens.resize(static_cast<std::size_t>(total.tokens));
  result.item_ids.resize(static_cast<std::size_t>(total.tokens));
  result.decision_rows.resize(static_cast<std::size_t>(total.decisions));
  result.decision_positions.resize(static_cast<std::size_t>(total.decisions));
  result.decision_ranks.resize(static_cast<std::size_t>(total.decisions));
  result.targets.resize(static_cast<std::size_t>(total.decisions));
  result.allowed_ids.resize(static_cast<std::size_t>(total.allowed));
  result.allowed_offsets.resize(static_cast<std::size_t>(total.decisions) + 1);
  result.below_items.resize(static_cast<std::size_t>(total.below));
  result.below_offsets.resize(static_cast<std::size_t>(total.allowed) + 1);
  for (const Position& start : starts) result.offsets.push_back(start.tokens);
  encode_all(&result);
  return result;
}

}  // namespace flexrec
