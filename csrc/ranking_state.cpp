#include "flexrec/ranking_state.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "flexrec/parallel.hpp"

namespace flexrec {

namespace {

constexpr int kTokensInMessage = 8;

[[noreturn]] void throw_rejected(std::int64_t row, std::int32_t step, std::int64_t token, const RowWalk& walk) {
  std::string allowed;
  int count = 0;
  walk.for_each_allowed([&](std::int32_t id) {
    if (count < kTokensInMessage) allowed += (count == 0 ? "" : ", ") + std::to_string(id);
    ++count;
    return true;
  });
  if (count > kTokensInMessage) allowed += ", .. (" + std::to_string(count) + " tokens)";
  throw std::invalid_argument("row " + std::to_string(row) + ", step " + std::to_string(step) + ": token " +
                              std::to_string(token) + " is not allowed; allowed: " + allowed);
}

}  // namespace

RankingState::RankingState(std::shared_ptr<const RankingGrammar> grammar)
    : grammar_(std::move(grammar)),
      cursors_(static_cast<std::size_t>(num_rows())),
      words_per_row_(bits::words_for(grammar_->max_num_candidates())),
      remaining_(static_cast<std::size_t>(num_rows() * words_per_row_)),
      placed_(static_cast<std::size_t>(num_rows() * max_num_ranked())),
      others_(static_cast<std::size_t>(num_rows())) {
  grammar_->check_end_is_certain();
  restart(nullptr);
}

void RankingState::restart(const std::uint8_t* chosen) {
  for (std::int64_t row = 0; row < num_rows(); ++row) {
    if (chosen == nullptr || chosen[row] != 0) walk(row).restart();
  }
}

RowWalk RankingState::walk(std::int64_t row) {
  const auto i = static_cast<std::size_t>(row);
  return {*grammar_, row, cursors_[i], remaining_.data() + row * words_per_row_, placed(row), others_[i]};
}

Csr RankingState::allowed() const {
  // Counted first, so that every row knows its place in the result and rows stay independent.
  std::vector<std::int64_t> counts(cursors_.size(), 0);
  const std::int64_t cost = num_rows() * grammar_->max_num_candidates() * 2;
  parallel_for(num_rows(), cost, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t count = 0;
      reader(row).for_each_allowed([&](std::int32_t) { return ++count, true; });
      counts[static_cast<std::size_t>(row)] = count;
    }
  });
  Csr result;
  result.offsets = offsets_from_counts(counts);
  result.ids.resize(static_cast<std::size_t>(result.offsets.back()));
  parallel_for(num_rows(), cost, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::int32_t* out = result.ids.data() + result.offsets[static_cast<std::size_t>(row)];
      reader(row).for_each_allowed([&](std::int32_t id) { return *out++ = id, true; });
    }
  });
  return result;
}

void RankingState::allowed_bitmask(std::int64_t vocab_size, std::int32_t* words, std::int64_t words_per_row,
                                   Csr& set) const {
  if (grammar_->max_token() >= vocab_size) {
    throw std::invalid_argument("vocab_size must exceed every token id of candidates, separator and end: got " +
                                std::to_string(vocab_size) + " with token " + std::to_string(grammar_->max_token()));
  }
  Csr allowed = this->allowed();
  if (set.offsets.empty()) set.offsets.assign(allowed.offsets.size(), 0);
  const auto cost = static_cast<std::int64_t>(set.ids.size() + allowed.ids.size()) * 2;
  parallel_for(num_rows(), cost, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const auto i = static_cast<std::size_t>(row);
      // Unsigned, because bit 31 is a bit like any other.
      auto* out = reinterpret_cast<std::uint32_t*>(words + row * words_per_row);
      const std::int32_t* const old = set.ids.data();
      const std::int32_t* const now = allowed.ids.data();
      std::for_each(old + set.offsets[i], old + set.offsets[i + 1], [&](std::int32_t id) { out[id / 32] = 0; });
      std::for_each(now + allowed.offsets[i], now + allowed.offsets[i + 1],
                    [&](std::int32_t id) { out[id / 32] |= std::uint32_t{1} << (id % 32); });
    }
  });
  set = std::move(allowed);
}

void RankingState::advance(const std::int64_t* tokens, const std::int64_t* offsets, OnRejected on_rejected) {
  // Only an error is ever taken back.
  const bool throws = on_rejected == OnRejected::kThrow;
  const std::vector<Cursor> before = throws ? cursors_ : std::vector<Cursor>{};
  std::vector<std::vector<Reading>> forked(throws ? cursors_.size() : 0);  // the readings of rows before they forked
  const std::int64_t num_tokens = offsets == nullptr ? num_rows() : offsets[num_rows()] - offsets[0];
  try {
    parallel_for(num_rows(), num_tokens * 20, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t first = offsets == nullptr ? row : offsets[row];
        const std::int64_t last = offsets == nullptr ? row + 1 : offsets[row + 1];
        RowWalk row_walk = walk(row);
        for (std::int64_t i = first; i < last && !row_walk.done() && !row_walk.lost(); ++i) {
          if (throws && forked[static_cast<std::size_t>(row)].empty() && row_walk.forks(tokens[i])) {
            forked[static_cast<std::size_t>(row)] = row_walk.readings();
          }
          if (row_walk.advance(tokens[i])) continue;
          if (throws) {
            throw_rejected(row, cursors_[static_cast<std::size_t>(row)].step, tokens[i], row_walk);
          }
          row_walk.lose();
        }
      }
    });
  } catch (...) {
    if (throws) undo(before, std::move(forked));
    throw;
  }
}

void RankingState::undo(const std::vector<Cursor>& before, std::vector<std::vector<Reading>>&& forked) {
  for (std::int64_t row = 0; row < num_rows(); ++row) {
    const auto i = static_cast<std::size_t>(row);
    if (!forked[i].empty()) walk(row).restore(std::move(forked[i]));
    for (std::int32_t rank = before[i].rank; rank < cursors_[i].rank; ++rank) {
      bits::insert(remaining_.data() + row * words_per_row_, placed(row)[rank]);
    }
  }
  cursors_ = before;
}

Csr RankingState::forced() const {
  std::vector<std::int64_t> counts(cursors_.size(), 0);
  // The runs are walked on copies, once to count and once to write.
  const auto for_each_forced = [&](std::int64_t row, Reading& scratch, auto&& visit) {
    const auto i = static_cast<std::size_t>(row);
    scratch.cursor = cursors_[i];
    std::copy_n(remaining_.data() + row * words_per_row_, words_per_row_, scratch.remaining.data());
    std::copy_n(placed(row), max_num_ranked(), scratch.placed.data());
    std::vector<Reading> others = others_[i];
    RowWalk copy(*grammar_, row, scratch.cursor, scratch.remaining.data(), scratch.placed.data(), others);
    for (std::int32_t id = copy.only_token(); id != Trie::kNone; id = copy.only_token()) {
      visit(id);
      copy.advance(id);
    }
  };
  const auto make_scratch = [&] {
    return Reading{{},
                   std::vector<bits::Word>(static_cast<std::size_t>(words_per_row_)),
                   std::vector<std::int32_t>(static_cast<std::size_t>(max_num_ranked()))};
  };
  const std::int64_t cost = num_rows() * 40;
  parallel_for(num_rows(), cost, [&](std::int64_t begin, std::int64_t end) {
    Reading scratch = make_scratch();
    for (std::int64_t row = begin; row < end; ++row) {
      for_each_forced(row, scratch, [&](std::int32_t) { ++counts[static_cast<std::size_t>(row)]; });
    }
  });
  Csr result;
  result.offsets = offsets_from_counts(counts);
  result.ids.resize(static_cast<std::size_t>(result.offsets.back()));
  parallel_for(num_rows(), cost, [&](std::int64_t begin, std::int64_t end) {
    Reading scratch = make_scratch();
    for (std::int64_t row = begin; row < end; ++row) {
      std::int32_t* out = result.ids.data() + result.offsets[static_cast<std::size_t>(row)];
      for_each_forced(row, scratch, [&](std::int32_t id) { *out++ = id; });
    }
  });
  return result;
}

std::vector<std::uint8_t> RankingState::done() const {
  std::vector<std::uint8_t> result(cursors_.size());
  for (std::int64_t row = 0; row < num_rows(); ++row) result[static_cast<std::size_t>(row)] = reader(row).done();
  return result;
}

std::vector<std::int32_t> RankingState::rankings() const {
  std::vector<std::int32_t> result(placed_.size(), -1);
  for (std::int64_t row = 0; row < num_rows(); ++row) {
    std::int32_t* out = result.data() + row * max_num_ranked();
    const std::int32_t num_certain = reader(row).num_certain();
    for (std::int32_t rank = 0; rank < num_certain; ++rank) {
      out[rank] = grammar_->trie(row).candidate(placed(row)[rank]);
    }
  }
  return result;
}

void step(RankingState& state, const std::int64_t* tokens, const std::int64_t* offsets, StepResult& result) {
  state.advance(tokens, offsets, RankingState::OnRejected::kLose);
  const Csr allowed = state.allowed();
  const auto before = static_cast<std::int64_t>(result.allowed.ids.size());
  result.allowed.ids.insert(result.allowed.ids.end(), allowed.ids.begin(), allowed.ids.end());
  for (std::int64_t row = 0; row < state.num_rows(); ++row) {
    result.allowed.offsets.push_back(before + allowed.offsets[static_cast<std::size_t>(row) + 1]);
  }
  const std::vector<std::uint8_t> done = state.done();
  result.done.insert(result.done.end(), done.begin(), done.end());
}

}  // namespace flexrec
