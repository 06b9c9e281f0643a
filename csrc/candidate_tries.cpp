#include "flexrec/candidate_tries.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "flexrec/parallel.hpp"

namespace flexrec {

namespace {

void check_offsets(const std::vector<std::int64_t>& offsets, std::int64_t last, const std::string& name) {
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != last ||
      !std::is_sorted(offsets.begin(), offsets.end())) {
    throw std::invalid_argument(name + " must rise from 0 to " + std::to_string(last));
  }
}

// The largest token of the list's sequences, all of which are checked.
std::int32_t check_list(const CandidateTokens& candidates, std::int64_t list) {
  const std::int64_t begin = candidates.list_offsets[static_cast<std::size_t>(list)];
  const std::int64_t size = candidates.list_offsets[static_cast<std::size_t>(list) + 1] - begin;
  const std::string list_name = "candidates[" + std::to_string(list) + "]";
  if (size == 0) throw std::invalid_argument(list_name + " is empty: a list needs a candidate");
  const std::int64_t* offsets = candidates.offsets_of(list);
  if (offsets[size] - offsets[0] >= std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument(list_name + " has " + std::to_string(offsets[size] - offsets[0]) +
                                " tokens, more than the nodes of a trie can be counted with");
  }
  std::int32_t largest = -1;
  for (std::int64_t k = 0; k < size; ++k) {
    if (offsets[k] == offsets[k + 1]) {
      throw std::invalid_argument(list_name + "[" + std::to_string(k) +
                                  "] is an empty token sequence: it could not be chosen");
    }
    for (std::int64_t i = offsets[k]; i < offsets[k + 1]; ++i) {
      const std::int32_t token = candidates.tokens[static_cast<std::size_t>(i)];
      if (token < 0) {
        throw std::invalid_argument(list_name + "[" + std::to_string(k) + "] must hold token ids >= 0, got " +
                                    std::to_string(token) + " at index " + std::to_string(i - offsets[k]));
      }
      largest = std::max(largest, token);
    }
  }
  return largest;
}

// Building a trie costs about this many elementary operations per token.
constexpr std::int64_t kOperationsPerToken = 30;

}  // namespace

CandidateTries::CandidateTries(CandidateTokens candidates) : candidates_(std::move(candidates)) {
  check_offsets(candidates_.sequence_offsets, static_cast<std::int64_t>(candidates_.tokens.size()), "sequence_offsets");
  check_offsets(candidates_.list_offsets, candidates_.num_sequences(), "list_offsets");
  for (std::int64_t list = 0; list < num_lists(); ++list) {
    max_token_ = std::max(max_token_, check_list(candidates_, list));
    const auto i = static_cast<std::size_t>(list);
    const std::int64_t size = candidates_.list_offsets[i + 1] - candidates_.list_offsets[i];
    max_num_candidates_ = std::max(max_num_candidates_, static_cast<std::int32_t>(size));
  }
  tries_.resize(static_cast<std::size_t>(num_lists()));
  const std::int64_t cost = static_cast<std::int64_t>(candidates_.tokens.size()) * kOperationsPerToken;
  parallel_for(num_lists(), cost, [&](std::int64_t begin, std::int64_t end) {
    for (auto list = static_cast<std::size_t>(begin); list < static_cast<std::size_t>(end); ++list) {
      const std::int64_t size = candidates_.list_offsets[list + 1] - candidates_.list_offsets[list];
      tries_[list] = Trie(candidates_.tokens.data(), candidates_.offsets_of(static_cast<std::int64_t>(list)),
                          static_cast<std::int32_t>(size));
    }
  });
}

}  // namespace flexrec
