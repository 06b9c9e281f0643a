// Tests of the core without Python, to be run under sanitizers:
//
//   cmake -B build/sanitize -DFLEXREC_PYTHON=OFF -DFLEXREC_TESTS=ON -DCMAKE_BUILD_TYPE=Debug
//         -DFLEXREC_SANITIZE=address,undefined && cmake --build build/sanitize && build/sanitize/flexrec_core_tests
//
// What the results should be is tested from Python, against enumeration; here batches large enough for several threads
// are walked, encoded and parsed, and must agree with one another.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flexrec/encode.hpp"
#include "flexrec/parallel.hpp"
#include "flexrec/parse.hpp"
#include "flexrec/permutation.hpp"
#include "flexrec/ranking_state.hpp"

namespace {

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

using flexrec::CandidateTokens;
using flexrec::CandidateTries;
using flexrec::RankingGrammar;
using flexrec::RankingState;
using Generator = std::mt19937;

int uniform(Generator& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

// Lists of up to 200 sequences that share prefixes, some of them equal.
using Tries = std::shared_ptr<const CandidateTries>;

Tries random_tries(Generator& random, int num_lists) {
  CandidateTokens result;
  for (int list = 0; list < num_lists; ++list) {
    for (int k = uniform(random, 1, 200); k > 0; --k) {
      for (int t = uniform(random, 1, 8); t > 0; --t) result.tokens.push_back(uniform(random, 0, 9));
      result.sequence_offsets.push_back(static_cast<std::int64_t>(result.tokens.size()));
    }
    result.list_offsets.push_back(static_cast<std::int64_t>(result.sequence_offsets.size()) - 1);
  }
  return std::make_shared<const CandidateTries>(std::move(result));
}

Tries single_list(const std::vector<std::vector<std::int32_t>>& sequences) {
  CandidateTokens result;
  for (const auto& sequence : sequences) {
    result.tokens.insert(result.tokens.end(), sequence.begin(), sequence.end());
    result.sequence_offsets.push_back(static_cast<std::int64_t>(result.tokens.size()));
  }
  result.list_offsets.push_back(static_cast<std::int64_t>(sequences.size()));
  return std::make_shared<const CandidateTries>(std::move(result));
}

// Samples completions token by token, jumping over forced runs now and then; returns them.
std::vector<std::vector<std::int64_t>> sample(RankingState& state, Generator& random) {
  std::vector<std::vector<std::int64_t>> completions(static_cast<std::size_t>(state.num_rows()));
  const auto all_done = [&] {
    const auto done = state.done();
    return std::accumulate(done.begin(), done.end(), std::int64_t{0}) == state.num_rows();
  };
  while (!all_done()) {
    const flexrec::Csr allowed = state.allowed();
    std::vector<std::int64_t> tokens(completions.size(), -1);
    for (std::size_t row = 0; row < completions.size(); ++row) {
      const std::int64_t count = allowed.offsets[row + 1] - allowed.offsets[row];
      if (count == 0) continue;
      const int pick = uniform(random, 0, static_cast<int>(count) - 1);
      tokens[row] = allowed.ids[static_cast<std::size_t>(allowed.offsets[row] + pick)];
      completions[row].push_back(tokens[row]);
    }
    state.advance(tokens.data(), nullptr);
    if (uniform(random, 0, 1) == 0) continue;
    const flexrec::Csr forced = state.forced();
    const std::vector<std::int64_t> run(forced.ids.begin(), forced.ids.end());
    state.advance(run.data(), forced.offsets.data());
    for (std::size_t row = 0; row < completions.size(); ++row) {
      completions[row].insert(completions[row].end(), run.begin() + forced.offsets[row],
                              run.begin() + forced.offsets[row + 1]);
    }
  }
  return completions;
}

void test_walks_agree_with_encoding_and_parsing() {
  Generator random(1);
  const Tries tries = random_tries(random, 60);
  flexrec::NumRanked num_ranked;
  num_ranked.at_most = 40;
  const auto grammar = std::make_shared<const RankingGrammar>(tries, std::vector<std::int32_t>{20, 3},
                                                              std::vector<std::int32_t>{21}, num_ranked, 3);
  RankingState state(grammar);
  const auto completions = sample(state, random);
  const std::vector<std::int32_t> rankings = state.rankings();
  const std::vector<std::int64_t> wide(rankings.begin(), rankings.end());

  const flexrec::EncodedBatch encoded = flexrec::encode_rankings(*grammar, wide.data(), state.max_num_ranked());
  CHECK(encoded.offsets.size() == completions.size() + 1);
  std::vector<std::int64_t> tokens;
  for (std::size_t row = 0; row < completions.size(); ++row) {
    tokens.insert(tokens.end(), completions[row].begin(), completions[row].end());
    CHECK(static_cast<std::int64_t>(tokens.size()) == encoded.offsets[row + 1]);
  }
  CHECK(std::vector<std::int64_t>(encoded.tokens.begin(), encoded.tokens.end()) == tokens);
  CHECK(static_cast<std::size_t>(encoded.allowed_offsets.back()) == encoded.allowed_ids.size());
  CHECK(static_cast<std::size_t>(encoded.below_offsets.back()) == encoded.below_items.size());

  const flexrec::ParsedBatch parsed = flexrec::parse_rankings(*grammar, tokens.data(), encoded.offsets.data());
  CHECK(parsed.ranking == rankings);
  CHECK(parsed.item_ids == encoded.item_ids);
  for (const std::uint8_t valid : parsed.valid) CHECK(valid == 1);

  // Junk still gives permutations.
  for (std::int64_t& token : tokens) token = uniform(random, 0, 3) == 0 ? uniform(random, -5, 30) : token;
  const flexrec::ParsedBatch repaired = flexrec::parse_rankings(*grammar, tokens.data(), encoded.offsets.data());
  const std::vector<std::int64_t> repaired_wide(repaired.ranking.begin(), repaired.ranking.end());
  CHECK(message_of([&] { flexrec::encode_rankings(*grammar, repaired_wide.data(), state.max_num_ranked()); }).empty());
}

void test_a_rejected_token_is_undone_in_every_thread() {
  Generator random(2);
  const Tries tries = random_tries(random, 3);
  const auto grammar = std::make_shared<const RankingGrammar>(
      tries, std::vector<std::int32_t>{20}, std::vector<std::int32_t>{21}, flexrec::NumRanked{}, 2000);
  RankingState reference(grammar);
  const auto completions = sample(reference, random);
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> offsets{0};
  for (const auto& completion : completions) {
    tokens.insert(tokens.end(), completion.begin(), completion.end());
    offsets.push_back(static_cast<std::int64_t>(tokens.size()));
  }
  RankingState state(grammar);
  const flexrec::Csr before = state.allowed();
  std::vector<std::int64_t> broken = tokens;
  broken[static_cast<std::size_t>(offsets[5000])] = -1;
  broken[static_cast<std::size_t>(offsets[5999])] = -1;
  const std::string message = message_of([&] { state.advance(broken.data(), offsets.data()); });
  CHECK(message.rfind("row 5000, step 0: token -1 is not allowed", 0) == 0);
  CHECK(state.allowed().ids == before.ids && state.allowed().offsets == before.offsets);
  state.advance(tokens.data(), offsets.data());
  CHECK(state.rankings() == reference.rankings());
}

// Rankings that are walked one by one, each in a state of its own, do what rows of one state do.
void test_stepping_states_together_is_stepping_their_rows() {
  Generator random(3);
  const Tries tries = random_tries(random, 40);
  const auto grammar_of = [](const Tries& lists) {
    return std::make_shared<const RankingGrammar>(lists, std::vector<std::int32_t>{20}, std::vector<std::int32_t>{21},
                                                  flexrec::NumRanked{}, 1);
  };
  RankingState batch(grammar_of(tries));
  std::vector<RankingState> single;
  for (std::int64_t list = 0; list < tries->num_lists(); ++list) {
    const flexrec::CandidateTokens& all = tries->candidates();
    const std::int64_t* offsets = all.offsets_of(list);
    std::vector<std::vector<std::int32_t>> sequences;
    for (std::int32_t k = 0; k < tries->trie(list).num_candidates(); ++k) {
      sequences.emplace_back(all.tokens.begin() + offsets[k], all.tokens.begin() + offsets[k + 1]);
    }
    single.emplace_back(grammar_of(single_list(sequences)));
  }
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> offsets(single.size() + 1, 0);
  for (bool all_done = false; !all_done;) {
    batch.advance(tokens.data(), offsets.data(), RankingState::OnRejected::kLose);
    const flexrec::Csr allowed = batch.allowed();
    flexrec::StepResult joint;
    for (std::size_t i = 0; i < single.size(); ++i) {
      flexrec::step(single[i], tokens.data(), offsets.data() + i, joint);
    }
    CHECK(joint.allowed.ids == allowed.ids && joint.allowed.offsets == allowed.offsets);
    CHECK(joint.done == batch.done());
    all_done = true;
    tokens.clear();
    for (std::size_t i = 0; i < single.size(); ++i) {
      const std::int64_t low = allowed.offsets[i];
      const std::int64_t high = allowed.offsets[i + 1];
      const bool waits = uniform(random, 0, 3) == 0;
      if (low < high && !waits) {
        const auto at = static_cast<std::size_t>(uniform(random, static_cast<int>(low), static_cast<int>(high) - 1));
        // Now and then a token that nothing allows: its row is lost, in both.
        tokens.push_back(uniform(random, 0, 500) == 0 ? 99 : allowed.ids[at]);
      }
      all_done = all_done && low == high;
      offsets[i + 1] = static_cast<std::int64_t>(tokens.size());
    }
  }
  std::int64_t finished = 0;
  for (std::size_t i = 0; i < single.size(); ++i) finished += single[i].done()[0];
  CHECK(0 < finished && finished < static_cast<std::int64_t>(single.size()));
}

void test_bitmask() {
  const auto grammar =
      std::make_shared<const RankingGrammar>(single_list({{0}, {31}, {32}, {95}}), std::vector<std::int32_t>{},
                                             std::vector<std::int32_t>{}, flexrec::NumRanked{}, 1);
  RankingState state(grammar);
  std::vector<std::int32_t> words(3, 0);
  flexrec::Csr set;
  state.allowed_bitmask(96, words.data(), 3, set);
  CHECK(static_cast<std::uint32_t>(words[0]) == 0x80000001U);
  CHECK(words[1] == 1);
  CHECK(static_cast<std::uint32_t>(words[2]) == 0x80000000U);
  CHECK(!message_of([&] { state.allowed_bitmask(95, words.data(), 3, set); }).empty());
  const std::int64_t token = 31;
  state.advance(&token, nullptr);
  state.allowed_bitmask(96, words.data(), 3, set);
  CHECK(words[0] == 1 && words[1] == 1 && static_cast<std::uint32_t>(words[2]) == 0x80000000U);
}

void test_ambiguity() {
  const auto grammar_of = [](Tries tries, std::vector<std::int32_t> separator, std::vector<std::int32_t> end,
                             std::int64_t most) {
    flexrec::NumRanked num_ranked;
    num_ranked.at_most = most;
    return std::make_shared<const RankingGrammar>(tries, std::move(separator), std::move(end), num_ranked, 1);
  };
  const Tries prefix = single_list({{4, 5}, {4}, {6}});
  const auto build = [&](std::vector<std::int32_t> separator, std::vector<std::int32_t> end, std::int64_t most) {
    return message_of([&] { RankingState(grammar_of(prefix, std::move(separator), std::move(end), most)); });
  };
  // Rankings of all candidates are equally long; others need an end that is told from a longer candidate.
  CHECK(build({9}, {}, 3).empty() && build({}, {}, 3).empty() && build({5}, {5}, 3).empty());
  CHECK(build({9}, {9}, 2).empty() && build({5}, {9}, 2).empty() && build({}, {9}, 2).empty());
  CHECK(build({9}, {}, 1).find("candidate 1 is a prefix of candidate 0") != std::string::npos);
  CHECK(build({9}, {5}, 2).find("choose an end that begins with a token of its own") != std::string::npos);
  CHECK(build({5}, {6}, 2).find("first token of the separator") != std::string::npos);
  CHECK(build({}, {6}, 2).find("without a separator") != std::string::npos);

  // Candidates that are rows of ones have more readings than anybody follows; what is followed ends in a ranking.
  std::vector<std::vector<std::int32_t>> ones;
  for (std::size_t length = 1; length <= 16; ++length) ones.emplace_back(length, 1);
  RankingState state(grammar_of(single_list(ones), {}, {2}, 8));
  Generator random(4);
  const auto completions = sample(state, random);
  const auto grammar = grammar_of(single_list(ones), {}, {2}, 8);
  const std::int64_t offsets[] = {0, static_cast<std::int64_t>(completions[0].size())};
  const flexrec::ParsedBatch parsed = flexrec::parse_rankings(*grammar, completions[0].data(), offsets);
  CHECK(parsed.valid[0] == 1 && parsed.ranking == state.rankings());
}

void test_long_sequence() {
  std::vector<std::int32_t> path(100'000, 7);
  std::vector<std::int32_t> other = path;
  other.back() = 8;
  const auto grammar = std::make_shared<const RankingGrammar>(single_list({path, other}), std::vector<std::int32_t>{},
                                                              std::vector<std::int32_t>{}, flexrec::NumRanked{}, 1);
  CHECK(RankingState(grammar).forced().ids.size() == path.size() - 1);
}

void test_parallel_for() {
  std::vector<int> visits(1000, 0);
  flexrec::parallel_for(1000, 1'000'000'000, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
  });
  for (const int count : visits) CHECK(count == 1);
  std::atomic<int> calls{0};
  flexrec::parallel_for(0, 1'000'000'000, [&](std::int64_t, std::int64_t) { ++calls; });
  CHECK(calls == 0);
  const std::string first = message_of([] {
    flexrec::parallel_for(1000, 1'000'000'000,
                          [](std::int64_t begin, std::int64_t) { throw std::invalid_argument(std::to_string(begin)); });
  });
  CHECK(first == "0");
}

}  // namespace

int main() {
  test_parallel_for();
  test_stepping_states_together_is_stepping_their_rows();
  test_bitmask();
  test_ambiguity();
  test_long_sequence();
  test_a_rejected_token_is_undone_in_every_thread();
  test_walks_agree_with_encoding_and_parsing();
  std::puts("all tests of the core passed");
  return 0;
}
