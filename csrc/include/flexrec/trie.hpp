#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace flexrec {

// The token sequences of one list's candidates as a trie.
//
// The candidates are sorted by their sequences (equal ones in candidate order), and a candidate's place in that order
// is its *leaf*. Below every node then lies one range of leaves, the candidates that end at the node first, so that
// "does a candidate of this set lie below this node" is a question about a range of bits, and taking a candidate out
// of a set is clearing one bit, with no counters along its path.
class Trie {
 public:
  struct Node {
    std::int32_t token;         // on the edge from the parent
    std::int32_t first_child;   // children are adjacent, by ascending token
    std::int32_t num_children;  //
    std::int32_t low;           // leaves [low, high) lie at or below this node,
    std::int32_t end_high;      // of which [low, end_high) end at it
    std::int32_t high;
  };

  static constexpr std::int32_t kRoot = 0;
  static constexpr std::int32_t kNone = -1;

  Trie() = default;

  // Candidate k is tokens[offsets[k]] .. tokens[offsets[k + 1] - 1], not empty.
  Trie(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_candidates);

  const Node& node(std::int32_t index) const { return nodes_[static_cast<std::size_t>(index)]; }
  std::int32_t num_nodes() const { return static_cast<std::int32_t>(nodes_.size()); }
  std::int32_t num_candidates() const { return static_cast<std::int32_t>(candidates_.size()); }

  std::int32_t candidate(std::int32_t leaf) const { return candidates_[static_cast<std::size_t>(leaf)]; }
  std::int32_t leaf(std::int32_t candidate) const { return leaves_[static_cast<std::size_t>(candidate)]; }

  // Whether a candidate is a proper prefix of another.
  bool has_prefixes() const { return has_prefixes_; }

  // The leaves [low, high) of the candidates with the same sequence as this leaf's.
  std::pair<std::int32_t, std::int32_t> equal_leaves(std::int32_t leaf) const;

  // The child of `parent` along `token`, or kNone.
  std::int32_t child_by_token(std::int32_t parent, std::int64_t token) const;

  // The child of `parent` that `leaf` lies below; `leaf` must lie below `parent` and not end there.
  std::int32_t child_by_leaf(std::int32_t parent, std::int32_t leaf) const;

 private:
  std::vector<Node> nodes_;
  std::vector<std::int32_t> candidates_;  // by leaf
  std::vector<std::int32_t> leaves_;      // by candidate
  bool has_prefixes_ = false;
};

}  // namespace flexrec
