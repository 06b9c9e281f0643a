#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "flexrec/bits.hpp"
#include "flexrec/csr.hpp"
#include "flexrec/cursor.hpp"
#include "flexrec/grammar.hpp"

namespace flexrec {

// N rankings in progress. Not to be used by two threads at once; its methods use threads themselves.
class RankingState {
 public:
  // Throws std::invalid_argument where it could not be told whether a row is finished.
  explicit RankingState(std::shared_ptr<const RankingGrammar> grammar);

  std::int64_t num_rows() const { return grammar_->num_rows(); }
  std::int32_t max_num_ranked() const { return grammar_->max_num_ranked(); }

  // Tokens that may come next, ascending within a row; none for finished rows.
  Csr allowed() const;

  // Writes the allowed tokens as bits to `words`, (N, words_per_row), 32 tokens a word, low bit first. `set` holds the
  // tokens whose bits are set in `words` before, none in zeros, and afterwards those that are set now: only they are
  // cleared, so that the cost does not grow with the vocabulary. Throws std::invalid_argument if a token does not fit.
  void allowed_bitmask(std::int64_t vocab_size, std::int32_t* words, std::int64_t words_per_row, Csr& set) const;

  // What becomes of a row that is fed a token which is not allowed: an error for all, or a lost row, which allows
  // nothing and ignores every token until it is restarted.
  enum class OnRejected { kThrow, kLose };

  // Reads tokens[offsets[i]] .. tokens[offsets[i + 1] - 1] into row i, or tokens[i] where offsets is null. Finished
  // rows ignore theirs. With kThrow throws std::invalid_argument for a token that is not allowed, and then nothing has
  // changed.
  void advance(const std::int64_t* tokens, const std::int64_t* offsets, OnRejected on_rejected = OnRejected::kThrow);

  // Puts the rows where `chosen`, (N,), is nonzero back to their beginning; all where it is null.
  void restart(const std::uint8_t* chosen);

  // The tokens without an alternative that come next.
  Csr forced() const;

  std::vector<std::uint8_t> done() const;

  // (N, max_num_ranked()) candidates by rank, -1 where open or not yet certain.
  std::vector<std::int32_t> rankings() const;

 private:
  std::int32_t* placed(std::int64_t row) { return placed_.data() + row * max_num_ranked(); }
  const std::int32_t* placed(std::int64_t row) const { return placed_.data() + row * max_num_ranked(); }
  // A walk changes its row only in advance() and restart(): const methods, which call neither, may cast.
  RowWalk walk(std::int64_t row);
  RowWalk reader(std::int64_t row) const { return const_cast<RankingState*>(this)->walk(row); }
  void undo(const std::vector<Cursor>& before, std::vector<std::vector<Reading>>&& forked);

  std::shared_ptr<const RankingGrammar> grammar_;
  std::vector<Cursor> cursors_;               // (N,)
  std::int64_t words_per_row_;                // of remaining_
  std::vector<bits::Word> remaining_;         // (N, words_per_row_) leaves not placed yet
  std::vector<std::int32_t> placed_;          // (N, max_num_ranked()) leaves by rank; undefined where open
  std::vector<std::vector<Reading>> others_;  // (N,) readings of the row beside this one, mostly none
};

// What rows may be continued with, and whether they are finished.
struct StepResult {
  Csr allowed{{}, {0}};
  std::vector<std::uint8_t> done;
};

// Reads tokens[offsets[i]] .. tokens[offsets[i + 1] - 1] into row i of the state, as advance() with kLose, and appends
// what the rows allow then to the result. For many small states, one after the other: rankings that come and go singly
// have no batch of their own.
void step(RankingState& state, const std::int64_t* tokens, const std::int64_t* offsets, StepResult& result);

}  // namespace flexrec
