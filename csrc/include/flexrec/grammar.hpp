#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "flexrec/trie.hpp"

namespace flexrec {

// Candidates of P lists: list p owns the sequences list_offsets[p] .. list_offsets[p + 1] - 1, and sequence s the
// tokens sequence_offsets[s] .. sequence_offsets[s + 1] - 1.
struct CandidateTokens {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> sequence_offsets{0};
  std::vector<std::int64_t> list_offsets{0};

  std::int64_t num_lists() const { return static_cast<std::int64_t>(list_offsets.size()) - 1; }
};

// How many items a row ranks: all of them, at most so many, or so many row by row.
struct NumRanked {
  std::optional<std::int64_t> at_most;
  std::vector<std::int64_t> by_row;  // empty, or (N,)
};

// What a batch of N = P * G well-formed rankings may look like: item separator item separator .. item end, every item
// one of the row's candidates and none twice. Rows of one list are adjacent and share its trie. Immutable.
class RankingGrammar {
 public:
  // Throws std::invalid_argument for input that could not be read back unambiguously; see the messages.
  RankingGrammar(const CandidateTokens& candidates, std::vector<std::int32_t> separator, std::vector<std::int32_t> end,
                 const NumRanked& num_ranked, std::int64_t num_generations);

  std::int64_t num_rows() const { return static_cast<std::int64_t>(num_ranked_.size()); }
  const Trie& trie(std::int64_t row) const { return tries_[static_cast<std::size_t>(row / num_generations_)]; }
  const std::vector<std::int32_t>& separator() const { return separator_; }
  const std::vector<std::int32_t>& end() const { return end_; }
  std::int32_t num_ranked(std::int64_t row) const { return num_ranked_[static_cast<std::size_t>(row)]; }

  std::int32_t max_num_ranked() const { return max_num_ranked_; }
  std::int32_t max_num_candidates() const { return max_num_candidates_; }
  std::int32_t max_token() const { return max_token_; }  // -1 without any

 private:
  void build_tries(const CandidateTokens& candidates);
  void set_num_ranked(const NumRanked& num_ranked);
  void check_ambiguity() const;

  std::vector<Trie> tries_;
  std::vector<std::int32_t> separator_;
  std::vector<std::int32_t> end_;
  std::vector<std::int32_t> num_ranked_;  // (N,)
  std::int64_t num_generations_;
  std::int32_t max_num_ranked_ = 0;
  std::int32_t max_num_candidates_ = 0;
  std::int32_t max_token_ = -1;
};

}  // namespace flexrec
