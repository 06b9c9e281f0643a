#include "flexrec/trie.hpp"

#include <algorithm>
#include <numeric>

namespace flexrec {

Trie::Trie(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_candidates)
    : candidates_(static_cast<std::size_t>(num_candidates)), leaves_(static_cast<std::size_t>(num_candidates)) {
  std::iota(candidates_.begin(), candidates_.end(), 0);
  std::stable_sort(candidates_.begin(), candidates_.end(), [&](std::int32_t a, std::int32_t b) {
    return std::lexicographical_compare(tokens + offsets[a], tokens + offsets[a + 1],  //
                                        tokens + offsets[b], tokens + offsets[b + 1]);
  });
  for (std::int32_t leaf = 0; leaf < num_candidates; ++leaf) {
    leaves_[static_cast<std::size_t>(candidate(leaf))] = leaf;
  }

  // Breadth first, so that siblings are adjacent.
  nodes_.push_back({kNone, 0, 0, 0, 0, num_candidates});
  std::int32_t level_end = 1;
  std::int64_t depth = 0;
  for (std::int32_t parent = 0; parent < num_nodes(); ++parent) {
    if (parent == level_end) {
      level_end = num_nodes();
      ++depth;
    }
    Node updated = node(parent);
    std::int32_t leaf = updated.low;
    const auto length = [&](std::int32_t at) { return offsets[candidate(at) + 1] - offsets[candidate(at)]; };
    const auto token = [&](std::int32_t at) { return tokens[offsets[candidate(at)] + depth]; };
    while (leaf < updated.high && length(leaf) == depth) ++leaf;
    updated.end_high = leaf;
    updated.first_child = num_nodes();
    while (leaf < updated.high) {
      const std::int32_t low = leaf;
      while (leaf < updated.high && token(leaf) == token(low)) ++leaf;
      nodes_.push_back({token(low), 0, 0, low, low, leaf});
    }
    updated.num_children = num_nodes() - updated.first_child;
    nodes_[static_cast<std::size_t>(parent)] = updated;
  }
}

std::int32_t Trie::child_by_token(std::int32_t parent, std::int64_t token) const {
  const Node* begin = nodes_.data() + node(parent).first_child;
  const Node* end = begin + node(parent).num_children;
  const Node* found = std::lower_bound(begin, end, token, [](const Node& n, std::int64_t t) { return n.token < t; });
  if (found == end || found->token != token) return kNone;
  return static_cast<std::int32_t>(found - nodes_.data());
}

std::int32_t Trie::child_by_leaf(std::int32_t parent, std::int32_t leaf) const {
  const Node* begin = nodes_.data() + node(parent).first_child;
  const Node* end = begin + node(parent).num_children;
  const Node* found = std::lower_bound(begin, end, leaf, [](const Node& n, std::int32_t l) { return n.high <= l; });
  return static_cast<std::int32_t>(found - nodes_.data());
}

}  // namespace flexrec
