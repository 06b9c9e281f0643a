#pragma once

#include <cstddef>
#include <cstdint>
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
  std::int64_t num_sequences() const { return static_cast<std::int64_t>(sequence_offsets.size()) - 1; }

  // Where the sequences of a list begin in `tokens`: one offset per candidate of the list, and one more.
  const std::int64_t* offsets_of(std::int64_t list) const {
    return sequence_offsets.data() + list_offsets[static_cast<std::size_t>(list)];
  }
};

// The candidates of P lists with a trie for each: what states, parsing and encoding share, built once. Immutable.
class CandidateTries {
 public:
  // Throws std::invalid_argument for offsets that do not fit, an empty list, an empty sequence and a negative token id.
  explicit CandidateTries(CandidateTokens candidates);

  std::int64_t num_lists() const { return candidates_.num_lists(); }
  const Trie& trie(std::int64_t list) const { return tries_[static_cast<std::size_t>(list)]; }
  const CandidateTokens& candidates() const { return candidates_; }
  std::int32_t max_num_candidates() const { return max_num_candidates_; }
  std::int32_t max_token() const { return max_token_; }  // -1 without any

 private:
  CandidateTokens candidates_;
  std::vector<Trie> tries_;
  std::int32_t max_num_candidates_ = 0;
  std::int32_t max_token_ = -1;
};

}  // namespace flexrec
