#include "flexrec/grammar.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "flexrec/parallel.hpp"

namespace flexrec {

namespace {

std::string text(std::int64_t number) { return std::to_string(number); }

void check_tokens(const std::vector<std::int32_t>& tokens, const std::string& name) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0) {
      throw std::invalid_argument(name + " must hold token ids >= 0, got " + text(tokens[i]) + " at index " +
                                  text(static_cast<std::int64_t>(i)));
    }
  }
}

// Two candidates of which the first is a proper prefix of the second, and after the first one `tail` (a separator or an
// end) could not be told from the second one going on.
struct Ambiguity {
  std::int32_t shorter;
  std::int32_t longer;
  std::int32_t next_token;
};

std::optional<Ambiguity> find_ambiguity(const Trie& trie, const std::vector<std::int32_t>& tail) {
  for (std::int32_t index = 0; index < trie.num_nodes(); ++index) {
    const Trie::Node& node = trie.node(index);
    if (node.low == node.end_high || node.num_children == 0) continue;
    const std::int32_t child = tail.empty() ? node.first_child : trie.child_by_token(index, tail.front());
    if (child == Trie::kNone) continue;
    return Ambiguity{trie.candidate(node.low), trie.candidate(trie.node(child).low), trie.node(child).token};
  }
  return std::nullopt;
}

[[noreturn]] void throw_ambiguous(std::int64_t list, const Ambiguity& found, const std::string& name, bool empty) {
  throw std::invalid_argument("candidates[" + text(list) + "]: candidate " + text(found.shorter) +
                              " is a prefix of candidate " + text(found.longer) + ", which goes on with token " +
                              text(found.next_token) + "; " +
                              (empty ? "without " + std::string(name == "end" ? "an " : "a ") + name
                                     : "as that is also the first token of the " + name) +
                              " the two cannot be told apart: choose another " + name);
}

}  // namespace

RankingGrammar::RankingGrammar(const CandidateTokens& candidates, std::vector<std::int32_t> separator,
                               std::vector<std::int32_t> end, const NumRanked& num_ranked, std::int64_t num_generations)
    : separator_(std::move(separator)), end_(std::move(end)), num_generations_(num_generations) {
  if (num_generations < 1) {
    throw std::invalid_argument("num_generations must be at least 1, got " + text(num_generations));
  }
  check_tokens(separator_, "separator");
  check_tokens(end_, "end");
  build_tries(candidates);
  set_num_ranked(num_ranked);
  check_ambiguity();
}

void RankingGrammar::build_tries(const CandidateTokens& candidates) {
  for (std::int64_t list = 0; list < candidates.num_lists(); ++list) {
    const std::int64_t begin = candidates.list_offsets[static_cast<std::size_t>(list)];
    const std::int64_t end = candidates.list_offsets[static_cast<std::size_t>(list) + 1];
    if (begin == end) throw std::invalid_argument("candidates[" + text(list) + "] is empty: a list needs a candidate");
    for (std::int64_t s = begin; s < end; ++s) {
      const std::int64_t first = candidates.sequence_offsets[static_cast<std::size_t>(s)];
      const std::int64_t last = candidates.sequence_offsets[static_cast<std::size_t>(s) + 1];
      const std::string name = "candidates[" + text(list) + "][" + text(s - begin) + "]";
      if (first == last) throw std::invalid_argument(name + " is an empty token sequence: it could not be chosen");
      for (std::int64_t i = first; i < last; ++i) {
        const std::int32_t token = candidates.tokens[static_cast<std::size_t>(i)];
        if (token < 0) {
          throw std::invalid_argument(name + " must hold token ids >= 0, got " + text(token) + " at index " +
                                      text(i - first));
        }
      }
    }
    max_num_candidates_ = std::max(max_num_candidates_, static_cast<std::int32_t>(end - begin));
  }
  const auto take_largest = [&](const std::vector<std::int32_t>& tokens) {
    for (const std::int32_t token : tokens) max_token_ = std::max(max_token_, token);
  };
  take_largest(candidates.tokens);
  take_largest(separator_);
  take_largest(end_);

  std::vector<std::optional<Trie>> built(static_cast<std::size_t>(candidates.num_lists()));
  const std::int64_t cost = static_cast<std::int64_t>(candidates.tokens.size()) * 30;
  parallel_for(candidates.num_lists(), cost, [&](std::int64_t first_list, std::int64_t last_list) {
    for (auto list = static_cast<std::size_t>(first_list); list < static_cast<std::size_t>(last_list); ++list) {
      const std::int64_t begin = candidates.list_offsets[list];
      built[list].emplace(candidates.tokens.data(), candidates.sequence_offsets.data() + begin,
                          static_cast<std::int32_t>(candidates.list_offsets[list + 1] - begin));
    }
  });
  tries_.reserve(built.size());
  for (std::optional<Trie>& trie : built) tries_.push_back(std::move(*trie));
}

void RankingGrammar::set_num_ranked(const NumRanked& num_ranked) {
  const std::int64_t num_rows = static_cast<std::int64_t>(tries_.size()) * num_generations_;
  if (num_ranked.at_most) {
    const std::int64_t most = *num_ranked.at_most;
    if (most < 1 || (num_rows > 0 && most > max_num_candidates_)) {
      throw std::invalid_argument("num_ranked must lie between 1 and the number of candidates (" +
                                  text(max_num_candidates_) + " in the longest list), got " + text(most));
    }
  }
  if (!num_ranked.by_row.empty() && static_cast<std::int64_t>(num_ranked.by_row.size()) != num_rows) {
    throw std::invalid_argument("num_ranked must have one entry per row, that is " + text(num_rows) + ", got " +
                                text(static_cast<std::int64_t>(num_ranked.by_row.size())));
  }
  num_ranked_.resize(static_cast<std::size_t>(num_rows));
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t num_candidates = trie(row).num_candidates();
    std::int64_t count = num_candidates;
    if (num_ranked.at_most) count = std::min(count, *num_ranked.at_most);
    if (!num_ranked.by_row.empty()) {
      count = num_ranked.by_row[static_cast<std::size_t>(row)];
      if (count < 1 || count > num_candidates) {
        throw std::invalid_argument("num_ranked must lie between 1 and the number of candidates (" +
                                    text(num_candidates) + " in row " + text(row) + "), got " + text(count));
      }
    }
    num_ranked_[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(count);
    max_num_ranked_ = std::max(max_num_ranked_, static_cast<std::int32_t>(count));
  }
}

void RankingGrammar::check_ambiguity() const {
  for (std::int64_t list = 0; list < static_cast<std::int64_t>(tries_.size()); ++list) {
    const Trie& trie = tries_[static_cast<std::size_t>(list)];
    // A separator follows wherever a second item does; where the last item is chosen, at least two candidates must be
    // left for any doubt.
    bool has_separator = false;
    bool last_is_chosen = false;
    for (std::int64_t row = list * num_generations_; row < (list + 1) * num_generations_; ++row) {
      has_separator |= num_ranked(row) >= 2;
      last_is_chosen |= num_ranked(row) < trie.num_candidates();
    }
    if (has_separator) {
      if (const auto found = find_ambiguity(trie, separator_)) {
        throw_ambiguous(list, *found, "separator", separator_.empty());
      }
    }
    if (last_is_chosen) {
      if (const auto found = find_ambiguity(trie, end_)) throw_ambiguous(list, *found, "end", end_.empty());
    }
  }
}

}  // namespace flexrec
