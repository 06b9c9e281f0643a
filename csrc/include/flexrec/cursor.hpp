#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexrec/bits.hpp"
#include "flexrec/grammar.hpp"

namespace flexrec {

// Where in its ranking a row is. Inside an item: at `node` of the trie. Between items: the next token is number `tail`
// of the separator, or of the end once all items are placed. Lost: it has read a token that was not allowed, and allows
// none.
struct Cursor {
  static constexpr std::int32_t kInItem = -1;
  static constexpr std::int32_t kLost = -2;

  std::int32_t rank = 0;  // items placed so far
  std::int32_t node = Trie::kRoot;
  std::int32_t tail = kInItem;
  std::int32_t step = 0;  // tokens read so far
};

// Steps one row's cursor through the grammar. The one place where it is decided which tokens may follow.
class RowWalk {
 public:
  enum class Step { kRejected, kItem, kTail };

  static constexpr std::int32_t kFirstLeft = -1;

  // `remaining`: the leaves of the row's trie not placed yet. Both are the caller's, and changed by advance().
  RowWalk(const RankingGrammar& grammar, std::int64_t row, Cursor& cursor, bits::Word* remaining)
      : grammar_(grammar),
        trie_(grammar.trie(row)),
        num_ranked_(grammar.num_ranked(row)),
        cursor_(cursor),
        remaining_(remaining) {}

  // Puts the row to its beginning.
  void restart() {
    cursor_ = Cursor{};
    bits::insert_all(remaining_, trie_.num_candidates());
  }

  bool done() const { return cursor_.rank == num_ranked_ && cursor_.tail == Cursor::kInItem; }
  bool lost() const { return cursor_.tail == Cursor::kLost; }
  void lose() { cursor_.tail = Cursor::kLost; }

  // Calls visit(token, low, high) for every allowed token by ascending id, until visit returns false; the remaining
  // leaves in [low, high) are the items that the token keeps possible. Where no item is being chosen the range is
  // empty.
  template <class Visit>
  void for_each_allowed(Visit&& visit) const {
    if (done() || lost()) return;
    if (cursor_.tail != Cursor::kInItem) {
      visit(tail(cursor_.rank)[static_cast<std::size_t>(cursor_.tail)], 0, 0);
      return;
    }
    const Trie::Node& node = trie_.node(cursor_.node);
    bool may_end = bits::any(remaining_, node.low, node.end_high);
    const std::int32_t end_token = may_end ? tail(cursor_.rank + 1).front() : 0;
    for (std::int32_t child = node.first_child; child < node.first_child + node.num_children; ++child) {
      const Trie::Node& next = trie_.node(child);
      if (!bits::any(remaining_, next.low, next.high)) continue;
      if (may_end && end_token < next.token) {
        if (!visit(end_token, node.low, node.end_high)) return;
        may_end = false;
      }
      if (!visit(next.token, next.low, next.high)) return;
    }
    if (may_end) visit(end_token, node.low, node.end_high);
  }

  // The token without an alternative, or Trie::kNone where there is a choice or nothing more to come.
  std::int32_t only_token() const {
    std::int32_t only = Trie::kNone;
    int count = 0;
    for_each_allowed([&](std::int32_t token, std::int32_t, std::int32_t) {
      only = token;
      return ++count < 2;
    });
    return count == 1 ? only : Trie::kNone;
  }

  // Reads `token`. A leaf that this places is written to placed[rank] unless `placed` is null: of candidates with equal
  // sequences the first that is left, or `wanted` if that is one of them. A rejected token changes nothing.
  Step advance(std::int64_t token, std::int32_t* placed, std::int32_t wanted = kFirstLeft) {
    if (done() || lost()) return Step::kRejected;
    if (cursor_.tail != Cursor::kInItem) {
      if (token != tail(cursor_.rank)[static_cast<std::size_t>(cursor_.tail)]) return Step::kRejected;
      read_tail_token();
      return Step::kTail;
    }
    const std::int32_t child = trie_.child_by_token(cursor_.node, token);
    if (child != Trie::kNone) {
      const Trie::Node& next = trie_.node(child);
      if (bits::any(remaining_, next.low, next.high)) {
        cursor_.node = child;
        ++cursor_.step;
        if (!bits::any(remaining_, next.end_high, next.high)) place(next, placed, wanted);
        return Step::kItem;
      }
    }
    const Trie::Node& node = trie_.node(cursor_.node);
    if (bits::any(remaining_, node.low, node.end_high) && token == tail(cursor_.rank + 1).front()) {
      place(node, placed, wanted);
      read_tail_token();
      return Step::kTail;
    }
    return Step::kRejected;
  }

  // The next token on the way to `leaf`, which must remain and lie below the cursor's node.
  std::int32_t token_towards(std::int32_t leaf) const {
    if (cursor_.tail != Cursor::kInItem) return tail(cursor_.rank)[static_cast<std::size_t>(cursor_.tail)];
    const Trie::Node& node = trie_.node(cursor_.node);
    if (leaf < node.end_high) return tail(cursor_.rank + 1).front();
    return trie_.node(trie_.child_by_leaf(cursor_.node, leaf)).token;
  }

 private:
  // What follows when `rank` items are placed.
  const std::vector<std::int32_t>& tail(std::int32_t rank) const {
    return rank < num_ranked_ ? grammar_.separator() : grammar_.end();
  }

  void read_tail_token() {
    ++cursor_.step;
    if (++cursor_.tail == static_cast<std::int32_t>(tail(cursor_.rank).size())) cursor_.tail = Cursor::kInItem;
  }

  void place(const Trie::Node& node, std::int32_t* placed, std::int32_t wanted) {
    const bool wanted_ends_here = node.low <= wanted && wanted < node.end_high;
    const std::int32_t leaf = wanted_ends_here ? wanted : bits::first(remaining_, node.low, node.end_high);
    bits::erase(remaining_, leaf);
    if (placed != nullptr) placed[cursor_.rank] = leaf;
    ++cursor_.rank;
    cursor_.node = Trie::kRoot;
    cursor_.tail = tail(cursor_.rank).empty() ? Cursor::kInItem : 0;
  }

  const RankingGrammar& grammar_;
  const Trie& trie_;
  const std::int32_t num_ranked_;
  Cursor& cursor_;
  bits::Word* const remaining_;
};

}  // namespace flexrec
