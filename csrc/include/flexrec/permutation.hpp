#pragma once

#include <cstdint>
#include <vector>

namespace flexrec {

// `rankings` is (N, width): candidates by rank, then -1. Row i chooses among num_candidates[i].
//
// Both throw std::invalid_argument, naming row and rank, for a candidate out of range, ranked twice, or after a -1.
void check_permutations(const std::int64_t* rankings, std::int64_t num_rows, std::int64_t width,
                        const std::vector<std::int64_t>& num_candidates);

// (N, largest num_candidates): the rank of every candidate, -1 for those not ranked.
std::vector<std::int32_t> inverse_permutations(const std::int64_t* rankings, std::int64_t num_rows, std::int64_t width,
                                               const std::vector<std::int64_t>& num_candidates);

}  // namespace flexrec
