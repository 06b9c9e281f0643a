// Hostile candidates and completions: whatever the bytes say, nothing crashes or hangs, refused candidates are refused
// with std::invalid_argument, and every completion gets a ranking.
//
// With Clang: cmake -DFLEXREC_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ .., then run flexrec_fuzz_rankings (libFuzzer).
// Without: main() below feeds the same function random bytes, the same ones at every run:
//
//   flexrec_fuzz_rankings [number of inputs]

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flexrec/encode.hpp"
#include "flexrec/parse.hpp"
#include "flexrec/permutation.hpp"
#include "flexrec/ranking_state.hpp"

namespace {

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

// Numbers from the input, zeros when it is used up.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::int64_t below(std::int64_t bound) { return next() % bound; }

  // Few ids, so that sequences share prefixes; now and then one at the edge of what an id may be, or beyond.
  std::int64_t token() {
    constexpr std::int64_t kExtremes[] = {-1, std::numeric_limits<std::int32_t>::max(),
                                          std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1,
                                          std::numeric_limits<std::int64_t>::min()};
    const std::int64_t byte = next();
    return byte < 252 ? byte % 5 : kExtremes[byte - 252];
  }

  std::int32_t narrow_token() {
    const std::int64_t id = token();
    return id == static_cast<std::int32_t>(id) ? static_cast<std::int32_t>(id) : 0;
  }

  std::vector<std::int32_t> sequence(std::int64_t length) {
    std::vector<std::int32_t> result(static_cast<std::size_t>(length));
    for (std::int32_t& id : result) id = narrow_token();
    return result;
  }

  // A separator or an end: of the candidates' tokens, or of others.
  std::vector<std::int32_t> tail() {
    std::vector<std::int32_t> result = sequence(below(4));
    if (!result.empty() && below(2) != 0) result.front() = 7;
    return result;
  }

 private:
  std::int64_t next() { return at_ < size_ ? data_[at_++] : 0; }

  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// Mostly a few tokens; one in 16 is long, one in 256 is empty, which is refused.
std::int64_t sequence_length(Bytes& bytes) {
  const std::int64_t kind = bytes.below(256);
  if (kind == 255) return 0;
  return 1 + bytes.below(kind % 16 == 15 ? 40 : 4);
}

flexrec::CandidateTokens read_candidates(Bytes& bytes) {
  flexrec::CandidateTokens result;
  for (std::int64_t list = bytes.below(4); list > 0; --list) {
    // One in four lists is longer than a word of bits.
    for (std::int64_t k = bytes.below(4) == 0 ? bytes.below(90) : bytes.below(6); k > 0; --k) {
      const std::vector<std::int32_t> sequence = bytes.sequence(sequence_length(bytes));
      result.tokens.insert(result.tokens.end(), sequence.begin(), sequence.end());
      // One in 256 sequences ends where it should not.
      const auto wrong = bytes.below(256) == 255 ? bytes.token() : 0;
      result.sequence_offsets.push_back(static_cast<std::int64_t>(result.tokens.size()) + wrong % 5);
    }
    result.list_offsets.push_back(static_cast<std::int64_t>(result.sequence_offsets.size()) - 1);
  }
  return result;
}

flexrec::NumRanked read_num_ranked(Bytes& bytes, std::int64_t num_rows) {
  flexrec::NumRanked result;
  const std::int64_t kind = bytes.below(4);
  if (kind == 1) result.at_most = bytes.below(6);
  if (kind == 2) {
    for (std::int64_t row = 0; row < num_rows; ++row) result.by_row.push_back(bytes.below(16) == 0 ? 0 : 1);
  }
  return result;
}

// Rows of different length: tokens and offsets.
struct Completions {
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> offsets{0};
};

Completions read_completions(Bytes& bytes, std::int64_t num_rows) {
  Completions result;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t i = bytes.below(64); i > 0; --i) result.tokens.push_back(bytes.token());
    result.offsets.push_back(static_cast<std::int64_t>(result.tokens.size()));
  }
  return result;
}

std::vector<std::int64_t> widened(const std::vector<std::int32_t>& values) { return {values.begin(), values.end()}; }

// Any completion gets a ranking; spelling it and reading that gives the same items, equal ones in candidate order.
void check_parsing(const flexrec::RankingGrammar& grammar, const Completions& completions) {
  const auto parsed = flexrec::parse_rankings(grammar, completions.tokens.data(), completions.offsets.data());
  for (std::int64_t row = 0; row < grammar.num_rows(); ++row) {
    const auto i = static_cast<std::size_t>(row);
    const std::int64_t length = completions.offsets[i + 1] - completions.offsets[i];
    CHECK(parsed.missing[i] >= 0 && parsed.missing[i] <= grammar.num_ranked(row));
    CHECK(parsed.repeated[i] >= 0 && parsed.repeated[i] + parsed.unknown[i] <= length);
    CHECK(parsed.valid[i] == 0 || (parsed.missing[i] == 0 && parsed.repeated[i] == 0 && parsed.unknown[i] == 0));
  }
  // Throws where a row is no permutation.
  const std::vector<std::int64_t> rankings = widened(parsed.ranking);
  flexrec::EncodedBatch encoded;
  try {
    encoded = flexrec::encode_rankings(grammar, rankings.data(), grammar.max_num_ranked());
  } catch (const std::invalid_argument& error) {
    CHECK(std::strstr(error.what(), "is spelled as another ranking is") != nullptr ||
          std::strstr(error.what(), "whether a ranking of not all candidates is finished") != nullptr);
    return;
  }
  const auto again = flexrec::parse_rankings(grammar, widened(encoded.tokens).data(), encoded.offsets.data());
  CHECK(std::all_of(again.valid.begin(), again.valid.end(), [](std::uint8_t valid) { return valid == 1; }));
  CHECK(again.item_ids == encoded.item_ids);
  CHECK(*std::max_element(encoded.offsets.begin(), encoded.offsets.end()) <= grammar.max_length() * grammar.num_rows());
}

// Rows fed with anything are lost, never wrong; rows fed with what is allowed are done after max_length() tokens, and
// what they were fed is read, and spelled again, as what they say that they rank.
void check_state(const std::shared_ptr<const flexrec::RankingGrammar>& grammar, const Completions& completions,
                 Bytes& bytes) {
  try {
    grammar->check_end_is_certain();
  } catch (const std::invalid_argument&) {
    return;
  }
  flexrec::RankingState state(grammar);
  const std::vector<std::int32_t> at_start = state.allowed().ids;
  try {
    state.advance(completions.tokens.data(), completions.offsets.data());
  } catch (const std::invalid_argument&) {
    CHECK(state.allowed().ids == at_start);  // an error changes nothing
    state.advance(completions.tokens.data(), completions.offsets.data(), flexrec::RankingState::OnRejected::kLose);
    state.forced();
    state.rankings();
  }
  state.restart(nullptr);
  std::vector<std::int32_t> words(static_cast<std::size_t>(grammar->num_rows()) * 8, 0);
  flexrec::Csr set;
  std::vector<std::vector<std::int64_t>> fed(static_cast<std::size_t>(grammar->num_rows()));
  for (std::int64_t step = 0; step < grammar->max_length(); ++step) {
    const flexrec::Csr allowed = state.allowed();
    const std::vector<std::uint8_t> done = state.done();
    if (grammar->max_token() < 256) state.allowed_bitmask(256, words.data(), 8, set);
    std::vector<std::int64_t> tokens(done.size(), -1);
    for (std::size_t row = 0; row < done.size(); ++row) {
      const std::int64_t count = allowed.offsets[row + 1] - allowed.offsets[row];
      CHECK((count == 0) == (done[row] == 1));
      if (count == 0) continue;
      tokens[row] = allowed.ids[static_cast<std::size_t>(allowed.offsets[row] + bytes.below(count))];
      fed[row].push_back(tokens[row]);
    }
    state.advance(tokens.data(), nullptr);
  }
  for (const std::uint8_t done : state.done()) CHECK(done == 1);
  Completions whole;
  for (const std::vector<std::int64_t>& row : fed) {
    whole.tokens.insert(whole.tokens.end(), row.begin(), row.end());
    whole.offsets.push_back(static_cast<std::int64_t>(whole.tokens.size()));
  }
  const auto parsed = flexrec::parse_rankings(*grammar, whole.tokens.data(), whole.offsets.data());
  CHECK(std::all_of(parsed.valid.begin(), parsed.valid.end(), [](std::uint8_t valid) { return valid == 1; }));
  CHECK(parsed.ranking == state.rankings());
  const auto encoded = flexrec::encode_rankings(*grammar, widened(parsed.ranking).data(), grammar->max_num_ranked());
  CHECK(widened(encoded.tokens) == whole.tokens && encoded.item_ids == parsed.item_ids);
  for (std::size_t i = 0; i + 1 < encoded.below_offsets.size(); ++i) {
    CHECK(encoded.below_offsets[i] < encoded.below_offsets[i + 1]);
  }
}

std::int64_t num_accepted = 0;  // inputs with rows whose candidates were not refused

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  std::shared_ptr<const flexrec::RankingGrammar> grammar;
  try {
    const auto tries = std::make_shared<const flexrec::CandidateTries>(read_candidates(bytes));
    std::vector<std::int32_t> separator = bytes.tail();
    std::vector<std::int32_t> end = bytes.tail();
    const std::int64_t num_generations = bytes.below(4);
    const flexrec::NumRanked num_ranked = read_num_ranked(bytes, tries->num_lists() * num_generations);
    grammar = std::make_shared<const flexrec::RankingGrammar>(tries, std::move(separator), std::move(end), num_ranked,
                                                              num_generations);
  } catch (const std::invalid_argument&) {
    return 0;
  }
  if (grammar->num_rows() > 0) ++num_accepted;
  const Completions completions = read_completions(bytes, grammar->num_rows());
  check_parsing(*grammar, completions);
  check_state(grammar, completions, bytes);
  return 0;
}

#ifndef FLEXREC_LIBFUZZER
int main(int argc, char** argv) {
  const long num_inputs = argc > 1 ? std::atol(argv[1]) : 10'000;
  std::mt19937 random(1);
  std::vector<std::uint8_t> input;
  for (long i = 0; i < num_inputs; ++i) {
    input.resize(random() % 2000);
    // Most bytes of half of the inputs are small: short sequences over few ids, which are refused less often.
    const bool is_small = random() % 2 == 0;
    for (std::uint8_t& byte : input) {
      byte = static_cast<std::uint8_t>(random());
      if (is_small && random() % 32 != 0) byte %= 16;
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs, of which %lld with candidates that make sense: no failure\n", num_inputs,
              static_cast<long long>(num_accepted));
  CHECK(num_accepted > num_inputs / 50);
  return 0;
}
#endif
