#pragma once

#include <cstdint>
#include <vector>

namespace flexrec {

// (N, largest num_candidates): the rank of every candidate, -1 for those not ranked. `rankings` is (N, width):
// candidates by rank, then -1; row i chooses among num_candidates[i].
//
// Throws std::invalid_argument, naming row and rank, for a candidate out of range, ranked twice, or after a -1.
std::vector<std::int32_t> inverse_permutations(const std::int64_t* rankings, std::int64_t num_rows, std::int64_t width,
                                               const std::vector<std::int64_t>& num_candidates);

}  // namespace flexrec
