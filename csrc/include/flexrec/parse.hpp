#pragma once

#include <cstdint>
#include <vector>

#include "flexrec/grammar.hpp"

namespace flexrec {

struct ParsedBatch {
  std::vector<std::int32_t> ranking;   // (N, max_num_ranked) candidates by rank, -1 beyond a row's own
  std::vector<std::uint8_t> valid;     // (N,) whether the completion is exactly a well-formed ranking
  std::vector<std::int32_t> repeated;  // (N,) mentions of candidates mentioned before
  std::vector<std::int32_t> missing;   // (N,) ranks that no mention filled
  std::vector<std::int32_t> unknown;   // (N,) stretches of tokens that are nothing known
  std::vector<std::int32_t> item_ids;  // one per token: the rank of the item that it belongs to, -1 for none
};

// Reads completions, row i being tokens[offsets[i]] .. tokens[offsets[i + 1] - 1], back into rankings.
//
// A completion that the grammar accepts as a whole is read by the grammar. Any other is searched for mentions from left
// to right: just after a mention a separator or end is looked for before an item, elsewhere an item (the longest
// candidate that matches) before a separator or end. Tokens that start neither form an unknown stretch, which lasts
// until the next of either. Where separators join mentions the longest run so joined is the ranking, the last of
// equally long ones, and mentions elsewhere are not; an item that is none of the candidates does not end a run. The
// ranking is the first mentions, in order, then the candidates not mentioned, in candidate order, cut to the row's
// number of ranked items.
//
// Takes O(tokens of the completion) per row, whatever the tokens are, and at most O(tokens of the candidates) more for
// a list.
ParsedBatch parse_rankings(const RankingGrammar& grammar, const std::int64_t* tokens, const std::int64_t* offsets);

}  // namespace flexrec
