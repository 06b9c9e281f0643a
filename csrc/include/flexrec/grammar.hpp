#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "flexrec/candidate_tries.hpp"

namespace flexrec {

// How many items a row ranks: all of them, at most so many, or so many row by row.
struct NumRanked {
  std::optional<std::int64_t> at_most;
  std::vector<std::int64_t> by_row;  // empty, or (N,)
};

// What a batch of N = P * G well-formed rankings may look like: item separator item separator .. item end, every item
// one of the row's candidates and none twice. Rows of one list are adjacent and share its trie. Immutable.
class RankingGrammar {
 public:
  // Throws std::invalid_argument for negative token ids and counts out of range; see the messages.
  RankingGrammar(std::shared_ptr<const CandidateTries> tries, std::vector<std::int32_t> separator,
                 std::vector<std::int32_t> end, const NumRanked& num_ranked, std::int64_t num_generations);

  std::int64_t num_rows() const { return static_cast<std::int64_t>(num_ranked_.size()); }
  std::int64_t list(std::int64_t row) const { return row / num_generations_; }
  const CandidateTries& tries() const { return *tries_; }
  const Trie& trie(std::int64_t row) const { return tries_->trie(list(row)); }
  const std::vector<std::int32_t>& separator() const { return separator_; }
  const std::vector<std::int32_t>& end() const { return end_; }
  std::int32_t num_ranked(std::int64_t row) const { return num_ranked_[static_cast<std::size_t>(row)]; }

  std::int32_t max_num_ranked() const { return max_num_ranked_; }
  std::int32_t max_num_candidates() const { return tries_->max_num_candidates(); }
  std::int32_t max_token() const { return max_token_; }  // -1 without any

  // Throws std::invalid_argument, naming the list, where a ranking's tokens may begin another's, so that it cannot be
  // told whether a row is finished: fine in a text that ends, not in one that is being written.
  void check_end_is_certain() const;

  // The most tokens that a ranking of any row is spelled with.
  std::int64_t max_length() const;

 private:
  void set_num_ranked(const NumRanked& num_ranked);

  std::shared_ptr<const CandidateTries> tries_;
  std::vector<std::int32_t> separator_;
  std::vector<std::int32_t> end_;
  std::vector<std::int32_t> num_ranked_;  // (N,)
  std::int64_t num_generations_;
  std::int32_t max_num_ranked_ = 0;
  std::int32_t max_token_ = -1;
};

}  // namespace flexrec
