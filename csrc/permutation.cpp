#include "flexrec/permutation.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "flexrec/parallel.hpp"

namespace flexrec {

namespace {

[[noreturn]] void throw_invalid(std::int64_t row, std::int64_t rank, const std::string& problem) {
  throw std::invalid_argument("rankings: row " + std::to_string(row) + ", rank " + std::to_string(rank) + ": " +
                              problem);
}

// Writes the rank of every candidate of one row to ranks[0 .. num_candidates), -1 for those not ranked.
void invert_row(std::int64_t row, const std::int64_t* ranking, std::int64_t width, std::int64_t num_candidates,
                std::int32_t* ranks) {
  std::fill_n(ranks, num_candidates, -1);
  bool ended = false;
  for (std::int64_t rank = 0; rank < width; ++rank) {
    const std::int64_t candidate = ranking[rank];
    if (candidate == -1) {
      ended = true;
      continue;
    }
    if (candidate < 0 || candidate >= num_candidates) {
      throw_invalid(row, rank,
                    "candidate " + std::to_string(candidate) + " is out of range, expected 0 .. " +
                        std::to_string(num_candidates - 1) + ", or -1 beyond the row's last rank");
    }
    if (ended) throw_invalid(row, rank, "candidate " + std::to_string(candidate) + " after a rank that is open (-1)");
    if (ranks[candidate] >= 0) {
      throw_invalid(
          row, rank,
          "candidate " + std::to_string(candidate) + " is already at rank " + std::to_string(ranks[candidate]));
    }
    ranks[candidate] = static_cast<std::int32_t>(rank);
  }
}

constexpr std::int64_t kOperationsPerEntry = 2;

}  // namespace

std::vector<std::int32_t> inverse_permutations(const std::int64_t* rankings, std::int64_t num_rows, std::int64_t width,
                                               const std::vector<std::int64_t>& num_candidates) {
  const std::int64_t out_width =
      num_candidates.empty() ? 0 : *std::max_element(num_candidates.begin(), num_candidates.end());
  std::vector<std::int32_t> ranks(static_cast<std::size_t>(num_rows * out_width), -1);
  parallel_for(num_rows, num_rows * width * kOperationsPerEntry, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      invert_row(row, rankings + row * width, width, num_candidates[static_cast<std::size_t>(row)],
                 ranks.data() + row * out_width);
    }
  });
  return ranks;
}

}  // namespace flexrec
