#include "flexrec/parse.hpp"

#include <algorithm>

#include "flexrec/cursor.hpp"
#include "flexrec/parallel.hpp"

namespace flexrec {

namespace {

struct Tokens {
  const std::int64_t* data;
  std::int64_t size;
};

// One row's place in the result.
struct ParsedRow {
  std::int32_t* ranking;  // holds leaves while the row is being read
  std::int32_t* item_ids;
  std::int32_t repeated = 0;
  std::int32_t unknown = 0;
};

// Whether the completion is exactly a well-formed ranking; if so it has been read.
bool read_by_grammar(Tokens completion, RowWalk walk, const Cursor& cursor, ParsedRow& out) {
  walk.restart();
  for (std::int64_t i = 0; i < completion.size; ++i) {
    const std::int32_t rank = cursor.rank;
    const RowWalk::Step step = walk.advance(completion.data[i], out.ranking);
    if (step == RowWalk::Step::kRejected) return false;
    out.item_ids[i] = step == RowWalk::Step::kItem ? rank : -1;
  }
  return walk.done();
}

// The length of `phrase` if `rest` begins with it, else 0.
std::int64_t match_phrase(Tokens rest, const std::vector<std::int32_t>& phrase) {
  const auto length = static_cast<std::int64_t>(phrase.size());
  return length <= rest.size && std::equal(phrase.begin(), phrase.end(), rest.data) ? length : 0;
}

struct Mention {
  std::int64_t length = 0;
  std::int32_t node = Trie::kNone;
};

// The longest candidate that `rest` begins with.
Mention match_item(Tokens rest, const Trie& trie) {
  Mention longest;
  std::int32_t node = Trie::kRoot;
  for (std::int64_t length = 0; length < rest.size;) {
    node = trie.child_by_token(node, rest.data[length]);
    if (node == Trie::kNone) break;
    ++length;
    if (trie.node(node).low < trie.node(node).end_high) longest = {length, node};
  }
  return longest;
}

// Returns the number of items ranked.
std::int32_t read_mentions(Tokens completion, const RankingGrammar& grammar, std::int64_t row, bits::Word* remaining,
                           ParsedRow& out) {
  const Trie& trie = grammar.trie(row);
  bits::insert_all(remaining, trie.num_candidates());
  std::fill_n(out.item_ids, completion.size, -1);
  std::int32_t num_placed = 0;
  bool after_mention = false;
  bool in_unknown = false;
  for (std::int64_t i = 0; i < completion.size;) {
    const Tokens rest{completion.data + i, completion.size - i};
    const std::int64_t tail = std::max(match_phrase(rest, grammar.separator()), match_phrase(rest, grammar.end()));
    const Mention mention = after_mention && tail > 0 ? Mention{} : match_item(rest, trie);
    after_mention = mention.length > 0;
    if (mention.length > 0) {
      const Trie::Node& node = trie.node(mention.node);
      const std::int32_t leaf = bits::first(remaining, node.low, node.end_high);
      if (leaf < 0) {
        ++out.repeated;
      } else {
        bits::erase(remaining, leaf);
        if (num_placed < grammar.num_ranked(row)) {
          std::fill_n(out.item_ids + i, mention.length, num_placed);
          out.ranking[num_placed++] = leaf;
        }
      }
      i += mention.length;
      in_unknown = false;
    } else if (tail > 0) {
      i += tail;
      in_unknown = false;
    } else {
      if (!in_unknown) ++out.unknown;
      in_unknown = true;
      ++i;
    }
  }
  return num_placed;
}

}  // namespace

ParsedBatch parse_rankings(const RankingGrammar& grammar, const std::int64_t* tokens, const std::int64_t* offsets) {
  const std::int64_t num_rows = grammar.num_rows();
  const auto size = static_cast<std::size_t>(num_rows);
  const std::int64_t width = grammar.max_num_ranked();
  ParsedBatch result;
  result.ranking.assign(static_cast<std::size_t>(num_rows * width), -1);
  result.valid.resize(size);
  result.repeated.resize(size);
  result.missing.resize(size);
  result.unknown.resize(size);
  result.item_ids.resize(static_cast<std::size_t>(offsets[num_rows]));

  parallel_for(num_rows, offsets[num_rows] * 40, [&](std::int64_t begin, std::int64_t end) {
    std::vector<bits::Word> remaining(static_cast<std::size_t>(bits::words_for(grammar.max_num_candidates())));
    for (std::int64_t row = begin; row < end; ++row) {
      const Trie& trie = grammar.trie(row);
      const std::int32_t num_ranked = grammar.num_ranked(row);
      const Tokens completion{tokens + offsets[row], offsets[row + 1] - offsets[row]};
      ParsedRow out{result.ranking.data() + row * width, result.item_ids.data() + offsets[row]};
      Cursor cursor;
      const bool valid = read_by_grammar(completion, {grammar, row, cursor, remaining.data()}, cursor, out);
      const std::int32_t num_placed =
          valid ? num_ranked : read_mentions(completion, grammar, row, remaining.data(), out);

      std::transform(out.ranking, out.ranking + num_placed, out.ranking,
                     [&](auto leaf) { return trie.candidate(leaf); });
      std::int32_t candidate = 0;
      for (std::int32_t rank = num_placed; rank < num_ranked; ++candidate) {
        if (bits::test(remaining.data(), trie.leaf(candidate))) out.ranking[rank++] = candidate;
      }
      const auto i = static_cast<std::size_t>(row);
      result.valid[i] = valid;
      result.repeated[i] = out.repeated;
      result.missing[i] = num_ranked - num_placed;
      result.unknown[i] = out.unknown;
    }
  });
  return result;
}

}  // namespace flexrec
