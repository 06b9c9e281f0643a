#pragma once

#include <cstdint>
#include <vector>

#include "flexrec/grammar.hpp"

namespace flexrec {

// The completions that spell given rankings, and every decision on the way. A decision is a token with an alternative.
struct EncodedBatch {
  std::vector<std::int32_t> tokens;      // (total,)
  std::vector<std::int64_t> offsets{0};  // (N + 1,) of rows in `tokens`
  std::vector<std::int32_t> item_ids;    // (total,) the rank of the item that a token belongs to, -1 for none

  std::vector<std::int32_t> decision_rows;       // (M,)
  std::vector<std::int32_t> decision_positions;  // (M,) within the row
  std::vector<std::int32_t> decision_ranks;      // (M,) of the first item that is not certain
  std::vector<std::int32_t> targets;             // (M,) the token decided for
  std::vector<std::int32_t> allowed_ids;         // (nnz,) what was allowed, ascending within a decision
  std::vector<std::int64_t> allowed_offsets{0};  // (M + 1,)
  std::vector<std::int32_t> below_items;         // per allowed id: the remaining candidates it keeps possible
  std::vector<std::int64_t> below_offsets{0};    // (nnz + 1,)
};

// `rankings` is (N, width): candidates by rank, num_ranked of them in each row, then -1. Throws std::invalid_argument
// for rows that are not, and for those whose tokens are read as another ranking. Steps the same walk as RankingState,
// so that the two cannot disagree. Without `with_allowed`
// what was allowed is left out, which is most of the work and of the memory.
EncodedBatch encode_rankings(const RankingGrammar& grammar, const std::int64_t* rankings, std::int64_t width,
                             bool with_allowed = true);

}  // namespace flexrec
