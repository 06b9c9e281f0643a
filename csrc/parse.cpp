#include "flexrec/parse.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "flexrec/cursor.hpp"
#include "flexrec/parallel.hpp"
#include "flexrec/phrase_matcher.hpp"

namespace flexrec {

namespace {

// Reading a completion costs about this many elementary operations per token.
constexpr std::int64_t kOperationsPerToken = 40;

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
bool read_by_grammar(Tokens completion, const RankingGrammar& grammar, std::int64_t row, bits::Word* remaining,
                     ParsedRow& out) {
  Cursor cursor;
  std::vector<Reading> others;
  RowWalk walk(grammar, row, cursor, remaining, out.ranking, others);
  walk.restart();
  for (std::int64_t i = 0; i < completion.size; ++i) {
    if (!walk.advance(completion.data[i])) return false;
  }
  if (!walk.finish()) return false;
  const std::int64_t* offsets = grammar.tries().candidates().offsets_of(grammar.list(row));
  std::fill_n(out.item_ids, completion.size, -1);
  std::int32_t* item_ids = out.item_ids;
  for (std::int32_t rank = 0; rank < grammar.num_ranked(row); ++rank) {
    const std::int32_t candidate = grammar.trie(row).candidate(out.ranking[rank]);
    item_ids = std::fill_n(item_ids, offsets[candidate + 1] - offsets[candidate], rank);
    if (rank + 1 < grammar.num_ranked(row)) item_ids += grammar.separator().size();
  }
  return true;
}

// The longest of a set of phrases at each position of a text, tried position by position while that is cheap:
// PhraseMatcher takes longer to build than a short completion to read. Trying costs as much as the failed attempts are
// long, so after a budget linear in the text a matcher is built and only what matches is walked.
class PhraseFinder {
 public:
  // The finder's trie, of the phrases that PhraseMatcher is built from when it comes to that.
  PhraseFinder(const Trie& trie, const std::int32_t* tokens, const std::int64_t* offsets)
      : trie_(trie), tokens_(tokens), offsets_(offsets) {}

  void read(Tokens text) {
    text_ = text;
    budget_ = kStepsPerToken * text.size;
    lengths_.clear();
  }

  struct Match {
    std::int64_t length = 0;
    std::int32_t node = Trie::kNone;
  };

  // The longest phrase that begins at text[at].
  Match longest(std::int64_t at) {
    if (budget_ < 0 && lengths_.empty()) match_all();
    const std::int64_t limit = lengths_.empty() ? text_.size - at : lengths_[static_cast<std::size_t>(at)];
    Match result;
    std::int32_t node = Trie::kRoot;
    std::int64_t length = 0;
    while (length < limit) {
      node = trie_.child_by_token(node, text_.data[at + length]);
      if (node == Trie::kNone) break;
      ++length;
      if (trie_.node(node).low < trie_.node(node).end_high) result = {length, node};
    }
    budget_ -= length;
    return result;
  }

 private:
  static constexpr std::int64_t kStepsPerToken = 8;

  void match_all() {
    if (!matcher_) matcher_.emplace(tokens_, offsets_, trie_.num_candidates());
    lengths_.resize(static_cast<std::size_t>(text_.size));
    matcher_->longest_lengths(text_.data, text_.size, lengths_.data());
  }

  const Trie& trie_;
  const std::int32_t* tokens_;
  const std::int64_t* offsets_;
  Tokens text_{nullptr, 0};
  std::int64_t budget_ = 0;
  std::optional<PhraseMatcher> matcher_;
  std::vector<std::int32_t> lengths_;  // by position; empty while positions are tried
};

// Separator and end, those that are not empty, as phrases.
struct Tails {
  explicit Tails(const RankingGrammar& grammar) {
    for (const std::vector<std::int32_t>* tail : {&grammar.separator(), &grammar.end()}) {
      if (tail->empty()) continue;
      tokens.insert(tokens.end(), tail->begin(), tail->end());
      offsets.push_back(static_cast<std::int64_t>(tokens.size()));
    }
    trie = Trie(tokens.data(), offsets.data(), static_cast<std::int32_t>(offsets.size()) - 1);
    has_separator = !grammar.separator().empty();
  }

  bool is_separator(std::int32_t node) const { return has_separator && trie.candidate(trie.node(node).low) == 0; }

  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> offsets{0};
  Trie trie;
  bool has_separator = false;
};

struct Mention {
  std::int64_t begin;
  std::int64_t length;
  std::int32_t node;
};

// What a completion mentions, and which of it is its ranking.
class MentionReader {
 public:
  explicit MentionReader(const RankingGrammar& grammar)
      : grammar_(grammar), tails_(grammar), tail_finder_(tails_.trie, tails_.tokens.data(), tails_.offsets.data()) {}

  // Places first mentions, which leave `remaining`, as leaves of the row's trie; returns how many ranks they filled.
  std::int32_t read(Tokens completion, std::int64_t row, PhraseFinder& items, bits::Word* remaining, ParsedRow& out) {
    out.unknown = find(completion, items);
    const Trie& trie = grammar_.trie(row);
    bits::insert_all(remaining, trie.num_candidates());
    std::fill_n(out.item_ids, completion.size, -1);
    std::int32_t num_placed = 0;
    for (std::size_t i = first_; i < last_; ++i) {
      const Mention& mention = mentions_[i];
      const Trie::Node& node = trie.node(mention.node);
      const std::int32_t leaf = bits::first(remaining, node.low, node.end_high);
      if (leaf < 0) {
        ++out.repeated;
        continue;
      }
      bits::erase(remaining, leaf);
      if (num_placed == grammar_.num_ranked(row)) continue;
      std::fill_n(out.item_ids + mention.begin, mention.length, num_placed);
      out.ranking[num_placed++] = leaf;
    }
    return num_placed;
  }

 private:
  // Finds the mentions, of which those from `first_` to `last_` are the ranking; returns the number of unknown
  // stretches. Two mentions are joined where a separator follows the first and another, or the same, precedes the
  // second: one of an unknown item may stand between them.
  std::int32_t find(Tokens completion, PhraseFinder& items) {
    mentions_.clear();
    first_ = last_ = 0;
    items.read(completion);
    tail_finder_.read(completion);
    enum class Kind { kStart, kMention, kSeparator, kEnd, kUnknown };
    Kind before = Kind::kStart;
    bool separator_follows = false;  // the last mention
    std::size_t run = 0;             // the first mention of the run
    std::int32_t num_unknown = 0;
    const auto end_run = [&] {
      const std::size_t size = mentions_.size() - run;
      if (size > 1 && size >= last_ - first_) first_ = run, last_ = mentions_.size();
      run = mentions_.size();
    };
    for (std::int64_t i = 0; i < completion.size;) {
      const PhraseFinder::Match tail = tail_finder_.longest(i);
      const bool tail_first = before == Kind::kMention && tail.length > 0;
      const PhraseFinder::Match mention = tail_first ? PhraseFinder::Match{} : items.longest(i);
      if (mention.length > 0) {
        if (before != Kind::kSeparator || !separator_follows) end_run();
        separator_follows = false;
        mentions_.push_back({i, mention.length, mention.node});
        before = Kind::kMention;
        i += mention.length;
      } else if (tail.length > 0) {
        const bool is_separator = tails_.is_separator(tail.node);
        if (before == Kind::kMention) separator_follows = is_separator;
        before = is_separator ? Kind::kSeparator : Kind::kEnd;
        i += tail.length;
      } else {
        if (before != Kind::kUnknown) ++num_unknown;
        before = Kind::kUnknown;
        ++i;
      }
    }
    end_run();
    if (last_ == 0 || grammar_.separator().empty()) first_ = 0, last_ = mentions_.size();
    return num_unknown;
  }

  const RankingGrammar& grammar_;
  const Tails tails_;
  PhraseFinder tail_finder_;
  std::vector<Mention> mentions_;
  std::size_t first_ = 0;
  std::size_t last_ = 0;
};

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

  const CandidateTokens& candidates = grammar.tries().candidates();
  parallel_for(num_rows, offsets[num_rows] * kOperationsPerToken, [&](std::int64_t begin, std::int64_t end) {
    std::vector<bits::Word> remaining(static_cast<std::size_t>(bits::words_for(grammar.max_num_candidates())));
    MentionReader mentions(grammar);
    std::optional<PhraseFinder> item_finder;  // shared by the rows of a list
    for (std::int64_t row = begin; row < end; ++row) {
      const Trie& trie = grammar.trie(row);
      if (row == begin || grammar.list(row) != grammar.list(row - 1)) {
        item_finder.emplace(trie, candidates.tokens.data(), candidates.offsets_of(grammar.list(row)));
      }
      const std::int32_t num_ranked = grammar.num_ranked(row);
      const Tokens completion{tokens + offsets[row], offsets[row + 1] - offsets[row]};
      ParsedRow out{result.ranking.data() + row * width, result.item_ids.data() + offsets[row]};
      const bool valid = read_by_grammar(completion, grammar, row, remaining.data(), out);
      const std::int32_t num_placed =
          valid ? num_ranked : mentions.read(completion, row, *item_finder, remaining.data(), out);

      std::transform(out.ranking, out.ranking + num_placed, out.ranking,
                     [&](std::int32_t leaf) { return trie.candidate(leaf); });
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
