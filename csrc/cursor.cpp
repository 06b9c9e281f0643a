#include "flexrec/cursor.hpp"

#include <tuple>
#include <utility>

namespace flexrec {

namespace {

// Whether nothing that may yet come can tell the two apart. Once all items are placed what remains does not matter.
bool same_future(const Reading& a, const Reading& b, std::int32_t num_ranked) {
  const auto place = [](const Cursor& cursor) { return std::tie(cursor.rank, cursor.node, cursor.tail); };
  return place(a.cursor) == place(b.cursor) && (a.cursor.rank == num_ranked || a.remaining == b.remaining);
}

}  // namespace

std::int32_t RowWalk::num_certain() const {
  std::int32_t result = cursor_.rank;
  for (const Reading& other : others_) {
    result = std::min(result, other.cursor.rank);
    result = static_cast<std::int32_t>(std::mismatch(placed_, placed_ + result, other.placed.data()).first - placed_);
  }
  return result;
}

std::vector<RowWalk::Branch> RowWalk::branches() const {
  const Trie& trie = grammar_.trie(row_);
  const std::int32_t certain = num_certain();
  std::vector<Branch> result;
  const auto collect = [&](const ReadingWalk& one) {
    one.for_each_branch([&](std::int32_t token, std::int32_t low, std::int32_t high) {
      if (one.cursor().rank > certain) std::tie(low, high) = trie.equal_leaves(one.placed(certain));
      result.push_back({token, low, high});
      return true;
    });
  };
  collect(first_);
  for (const Reading& other : others_) collect(walk(other));
  std::stable_sort(result.begin(), result.end(), [](const Branch& a, const Branch& b) { return a.token < b.token; });
  return result;
}

bool RowWalk::advance_all(std::int64_t token) {
  std::vector<Reading> next;
  for (const Reading& reading : readings()) {
    const bool forks = walk(reading).forks(token);
    for (const ReadingWalk::Take take : {ReadingWalk::Take::kLonger, ReadingWalk::Take::kShorter}) {
      if (take == ReadingWalk::Take::kShorter && !forks) continue;
      Reading advanced = reading;
      if (!walk(advanced).advance(token, take)) continue;
      const auto is_known = [&](const Reading& known) {
        return same_future(known, advanced, grammar_.num_ranked(row_));
      };
      if (next.size() < kMaxReadings && std::none_of(next.begin(), next.end(), is_known)) {
        next.push_back(std::move(advanced));
      }
    }
  }
  if (next.empty()) return false;
  restore(std::move(next));
  return true;
}

bool RowWalk::finish() {
  std::vector<Reading> all = readings();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Reading& one) { return walk(one).done(); });
  if (found == all.end()) return false;
  std::vector<Reading> only;
  only.push_back(std::move(*found));
  restore(std::move(only));
  return true;
}

std::vector<Reading> RowWalk::readings() const {
  const std::int32_t num_words = bits::words_for(grammar_.trie(row_).num_candidates());
  std::vector<Reading> result;
  result.reserve(others_.size() + 1);
  result.push_back({cursor_, {remaining_, remaining_ + num_words}, {placed_, placed_ + grammar_.num_ranked(row_)}});
  result.insert(result.end(), others_.begin(), others_.end());
  return result;
}

void RowWalk::restore(std::vector<Reading>&& readings) {
  const Reading& first = readings.front();
  cursor_ = first.cursor;
  std::copy(first.remaining.begin(), first.remaining.end(), remaining_);
  std::copy(first.placed.begin(), first.placed.end(), placed_);
  readings.erase(readings.begin());
  others_ = std::move(readings);
}

}  // namespace flexrec
