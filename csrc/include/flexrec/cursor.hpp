#pragma once

#include <algorithm>
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

// One way to read what a row has been fed.
struct Reading {
  Cursor cursor;
  std::vector<bits::Word> remaining;
  std::vector<std::int32_t> placed;
};

// Steps one reading through the grammar. The one place where it is decided which tokens may follow.
class ReadingWalk {
 public:
  // Where a candidate may be complete though a longer one may yet come.
  enum class Take { kLonger, kShorter };

  // `remaining`: the leaves of the row's trie not placed yet; `placed`: leaves by rank. Both and the cursor are the
  // caller's, and changed by advance().
  ReadingWalk(const RankingGrammar& grammar, std::int64_t row, Cursor& cursor, bits::Word* remaining,
              std::int32_t* placed)
      : grammar_(grammar),
        trie_(grammar.trie(row)),
        num_ranked_(grammar.num_ranked(row)),
        cursor_(cursor),
        remaining_(remaining),
        placed_(placed) {}

  ReadingWalk(const RankingGrammar& grammar, std::int64_t row, Reading& reading)
      : ReadingWalk(grammar, row, reading.cursor, reading.remaining.data(), reading.placed.data()) {}

  // Puts the row to its beginning.
  void restart() {
    cursor_ = Cursor{};
    bits::insert_all(remaining_, trie_.num_candidates());
  }

  const Cursor& cursor() const { return cursor_; }
  std::int32_t placed(std::int32_t rank) const { return placed_[rank]; }
  bool done() const { return cursor_.rank == num_ranked_ && cursor_.tail == Cursor::kInItem; }
  bool lost() const { return cursor_.tail == Cursor::kLost; }
  void lose() { cursor_.tail = Cursor::kLost; }

  // Calls visit(token, low, high) for every allowed token by ascending id, until visit returns false; the remaining
  // leaves in [low, high) are the items that the token keeps possible. Where no item is being chosen the range is
  // empty. A token that may close a candidate and may go on with a longer one is visited twice.
  template <class Visit>
  void for_each_branch(Visit&& visit) const {
    if (done() || lost()) return;
    if (cursor_.tail != Cursor::kInItem) {
      visit(tail(cursor_.rank)[static_cast<std::size_t>(cursor_.tail)], 0, 0);
      return;
    }
    const Trie::Node& node = trie_.node(cursor_.node);
    bool may_close = closes_by_token(node);
    const std::int32_t close_token = may_close ? tail(cursor_.rank + 1).front() : 0;
    for (std::int32_t child = node.first_child; child < node.first_child + node.num_children; ++child) {
      const Trie::Node& next = trie_.node(child);
      if (!bits::any(remaining_, next.low, next.high)) continue;
      if (may_close && close_token <= next.token) {
        if (!visit(close_token, node.low, node.end_high)) return;
        may_close = false;
      }
      if (!visit(next.token, next.low, next.high)) return;
    }
    if (may_close) visit(close_token, node.low, node.end_high);
  }

  // Whether `token` can be read in two ways: as going on with a candidate and as closing one.
  bool forks(std::int64_t token) const {
    if (!trie_.has_prefixes() || done() || cursor_.tail != Cursor::kInItem) return false;
    const Trie::Node& node = trie_.node(cursor_.node);
    if (closes_by_token(node) && token == tail(cursor_.rank + 1).front()) return child_of(token) != Trie::kNone;
    const std::int32_t child = child_of(token);
    return child != Trie::kNone && closes_silently(trie_.node(child));
  }

  // Reads `token`; one that is rejected changes nothing. kShorter is for tokens that fork, kLonger for all.
  bool advance(std::int64_t token, Take take = Take::kLonger) {
    if (done() || lost()) return false;
    if (cursor_.tail != Cursor::kInItem) {
      if (token != tail(cursor_.rank)[static_cast<std::size_t>(cursor_.tail)]) return false;
      read_tail_token();
      return true;
    }
    const Trie::Node& node = trie_.node(cursor_.node);
    const bool closes = closes_by_token(node) && token == tail(cursor_.rank + 1).front();
    const std::int32_t child = closes && take == Take::kShorter ? Trie::kNone : child_of(token);
    if (child != Trie::kNone) {
      const Trie::Node& next = trie_.node(child);
      cursor_.node = child;
      ++cursor_.step;
      // Of candidates with equal sequences the first that is left is placed.
      if (take == Take::kShorter || !bits::any(remaining_, next.end_high, next.high)) place(next);
      return true;
    }
    if (!closes) return false;
    place(node);
    read_tail_token();
    return true;
  }

 private:
  // What follows when `rank` items are placed.
  const std::vector<std::int32_t>& tail(std::int32_t rank) const {
    return rank < num_ranked_ ? grammar_.separator() : grammar_.end();
  }

  // The node below the cursor's that `token` leads to, if candidates are left there.
  std::int32_t child_of(std::int64_t token) const {
    const std::int32_t child = trie_.child_by_token(cursor_.node, token);
    if (child == Trie::kNone || !bits::any(remaining_, trie_.node(child).low, trie_.node(child).high)) {
      return Trie::kNone;
    }
    return child;
  }

  // Whether a candidate that ends at the node is closed by the first token of what follows it.
  bool closes_by_token(const Trie::Node& node) const {
    return bits::any(remaining_, node.low, node.end_high) && !tail(cursor_.rank + 1).empty();
  }

  // Whether one ends there with nothing to close it, while a longer one may yet come.
  bool closes_silently(const Trie::Node& node) const {
    return tail(cursor_.rank + 1).empty() && bits::any(remaining_, node.low, node.end_high) &&
           bits::any(remaining_, node.end_high, node.high);
  }

  void read_tail_token() {
    ++cursor_.step;
    if (++cursor_.tail == static_cast<std::int32_t>(tail(cursor_.rank).size())) cursor_.tail = Cursor::kInItem;
  }

  void place(const Trie::Node& node) {
    const std::int32_t leaf = bits::first(remaining_, node.low, node.end_high);
    bits::erase(remaining_, leaf);
    placed_[cursor_.rank++] = leaf;
    cursor_.node = Trie::kRoot;
    cursor_.tail = tail(cursor_.rank).empty() ? Cursor::kInItem : 0;
  }

  const RankingGrammar& grammar_;
  const Trie& trie_;
  const std::int32_t num_ranked_;
  Cursor& cursor_;
  bits::Word* const remaining_;
  std::int32_t* const placed_;
};

// Steps one row: all the ways to read it. Mostly there is one. Where a candidate followed by what comes after it begins
// a longer candidate, both are followed until one of them fails; if neither does, that is the row's reading whose item
// is the longer where they first differ.
class RowWalk {
 public:
  // The first reading is the caller's cursor, `remaining` and `placed` (of num_ranked leaves), the others are in
  // `others`, those with longer items first.
  RowWalk(const RankingGrammar& grammar, std::int64_t row, Cursor& cursor, bits::Word* remaining, std::int32_t* placed,
          std::vector<Reading>& others)
      : grammar_(grammar),
        row_(row),
        cursor_(cursor),
        remaining_(remaining),
        placed_(placed),
        first_(grammar, row, cursor, remaining, placed),
        others_(others) {}

  void restart() {
    first_.restart();
    others_.clear();
  }

  bool done() const { return first_.done(); }
  bool lost() const { return first_.lost(); }
  void lose() {
    first_.lose();
    others_.clear();
  }

  // How many items all readings agree on, from the first rank on.
  std::int32_t num_certain() const;

  // Calls visit(token) for every allowed token by ascending id, until visit returns false.
  template <class Visit>
  void for_each_allowed(Visit&& visit) const {
    std::int32_t last = Trie::kNone;
    for_each_branch([&](std::int32_t token, std::int32_t, std::int32_t) {
      if (token == last) return true;
      last = token;
      return visit(token);
    });
  }

  // Calls visit(token, low, high) for every allowed token by ascending id, until visit returns false: of the remaining
  // leaves in [low, high), which may include placed ones, one is at rank num_certain() if that token comes. A token
  // that can be read in several ways is visited for each.
  template <class Visit>
  void for_each_branch(Visit&& visit) const {
    if (others_.empty()) return first_.for_each_branch(visit);
    for (const Branch& branch : branches()) {
      if (!visit(branch.token, branch.low, branch.high)) return;
    }
  }

  // The token without an alternative, or Trie::kNone where there is a choice or nothing more to come.
  std::int32_t only_token() const {
    std::int32_t only = Trie::kNone;
    int count = 0;
    for_each_allowed([&](std::int32_t token) {
      only = token;
      return ++count < 2;
    });
    return count == 1 ? only : Trie::kNone;
  }

  // Whether the row has, or will have after `token`, more than one reading.
  bool forks(std::int64_t token) const { return !others_.empty() || first_.forks(token); }

  // Reads `token`; one that is rejected changes nothing.
  bool advance(std::int64_t token) { return forks(token) ? advance_all(token) : first_.advance(token); }

  // Nothing more will come: whether the row is a whole ranking in some reading, of which the first becomes the only
  // one.
  bool finish();

  // All readings, and the way back.
  std::vector<Reading> readings() const;
  void restore(std::vector<Reading>&& readings);

 private:
  struct Branch {
    std::int32_t token, low, high;
  };

  // Readings beyond so many, those with the shorter items, are given up: candidates such as 1, 11, 111, .. have
  // exponentially many.
  static constexpr std::size_t kMaxReadings = 64;

  std::vector<Branch> branches() const;
  bool advance_all(std::int64_t token);
  ReadingWalk walk(const Reading& reading) const { return {grammar_, row_, const_cast<Reading&>(reading)}; }

  const RankingGrammar& grammar_;
  const std::int64_t row_;
  Cursor& cursor_;
  bits::Word* const remaining_;
  std::int32_t* const placed_;
  ReadingWalk first_;
  std::vector<Reading>& others_;
};

}  // namespace flexrec
