#include "flexrec/grammar.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

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

// Whether `token` stands in one of the list's candidates.
bool occurs(const CandidateTries& tries, std::int64_t list, std::int32_t token) {
  const CandidateTokens& candidates = tries.candidates();
  const std::int64_t* offsets = candidates.offsets_of(list);
  const std::int32_t* tokens = candidates.tokens.data();
  const std::int32_t* end = tokens + offsets[tries.trie(list).num_candidates()];
  return std::find(tokens + offsets[0], end, token) != end;
}

}  // namespace

RankingGrammar::RankingGrammar(std::shared_ptr<const CandidateTries> tries, std::vector<std::int32_t> separator,
                               std::vector<std::int32_t> end, const NumRanked& num_ranked, std::int64_t num_generations)
    : tries_(std::move(tries)),
      separator_(std::move(separator)),
      end_(std::move(end)),
      num_generations_(num_generations),
      max_token_(tries_->max_token()) {
  if (num_generations < 1 || num_generations > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("num_generations must be at least 1 and at most 2147483647, got " +
                                text(num_generations));
  }
  check_tokens(separator_, "separator");
  check_tokens(end_, "end");
  for (const std::int32_t token : separator_) max_token_ = std::max(max_token_, token);
  for (const std::int32_t token : end_) max_token_ = std::max(max_token_, token);
  set_num_ranked(num_ranked);
}

void RankingGrammar::set_num_ranked(const NumRanked& num_ranked) {
  const std::int64_t num_rows = tries_->num_lists() * num_generations_;
  if (num_ranked.at_most) {
    const std::int64_t most = *num_ranked.at_most;
    if (most < 1 || (num_rows > 0 && most > max_num_candidates())) {
      throw std::invalid_argument("num_ranked must lie between 1 and the number of candidates (" +
                                  text(max_num_candidates()) + " in the longest list), got " + text(most));
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

// Rankings of all candidates are spelled with equally many tokens, so that none begins another. Of the others, one may
// where the last item is a prefix of a candidate that goes on as the end begins; and where items are ambiguous in their
// midst, unless the end begins with a token that stands nowhere else.
void RankingGrammar::check_end_is_certain() const {
  for (std::int64_t list = 0; list < tries_->num_lists(); ++list) {
    const Trie& trie = tries_->trie(list);
    if (!trie.has_prefixes()) continue;
    std::int32_t most = 0;  // ranked by a row that leaves some out
    for (std::int64_t row = list * num_generations_; row < (list + 1) * num_generations_; ++row) {
      if (num_ranked(row) < trie.num_candidates()) most = std::max(most, num_ranked(row));
    }
    if (most == 0) continue;
    std::optional<Ambiguity> found = find_ambiguity(trie, end_);
    std::string because = end_.empty() ? "without an end" : "as that is also the first token of the end,";
    if (!found && most >= 2) {
      found = find_ambiguity(trie, separator_);
      if (found && std::count(separator_.begin(), separator_.end(), end_.front()) == 0 &&
          !occurs(*tries_, list, end_.front())) {
        continue;
      }
      because = separator_.empty() ? "without a separator" : "as that is also the first token of the separator,";
    }
    if (!found) continue;
    throw std::invalid_argument("candidates[" + text(list) + "]: candidate " + text(found->shorter) +
                                " is a prefix of candidate " + text(found->longer) + ", which goes on with token " +
                                text(found->next_token) + "; " + because +
                                " it cannot be told whether a ranking of not all candidates is finished: choose an end "
                                "that begins with a token of its own");
  }
}

std::int64_t RankingGrammar::max_length() const {
  std::int64_t result = 0;
  std::vector<std::int64_t> lengths;
  for (std::int64_t list = 0; list < tries_->num_lists(); ++list) {
    const std::int64_t first_row = list * num_generations_;
    const std::int32_t* most =
        std::max_element(num_ranked_.data() + first_row, num_ranked_.data() + first_row + num_generations_);
    const std::int64_t* offsets = tries_->candidates().offsets_of(list);
    lengths.clear();
    for (std::int32_t k = 0; k < tries_->trie(list).num_candidates(); ++k)
      lengths.push_back(offsets[k + 1] - offsets[k]);
    std::partial_sort(lengths.begin(), lengths.begin() + *most, lengths.end(), std::greater<>());
    const std::int64_t items = std::accumulate(lengths.begin(), lengths.begin() + *most, std::int64_t{0});
    const auto separators = (*most - 1) * static_cast<std::int64_t>(separator_.size());
    result = std::max(result, items + separators + static_cast<std::int64_t>(end_.size()));
  }
  return result;
}

}  // namespace flexrec
