#include "flexrec/trie.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace flexrec {

namespace {

// Orders like the sequence's first two tokens: most comparisons need no more.
std::uint64_t sort_key(const std::int32_t* begin, const std::int32_t* end) {
  const std::uint64_t second = end - begin > 1 ? static_cast<std::uint64_t>(begin[1]) + 1 : 0;
  return static_cast<std::uint64_t>(begin[0]) << 32 | second;
}

}  // namespace

Trie::Trie(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_candidates)
    : candidates_(static_cast<std::size_t>(num_candidates)), leaves_(static_cast<std::size_t>(num_candidates)) {
  std::vector<std::pair<std::uint64_t, std::int32_t>> order(static_cast<std::size_t>(num_candidates));
  for (std::int32_t k = 0; k < num_candidates; ++k) {
    order[static_cast<std::size_t>(k)] = {sort_key(tokens + offsets[k], tokens + offsets[k + 1]), k};
  }
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    if (a.first != b.first) return a.first < b.first;
    const std::int32_t* begin_a = tokens + offsets[a.second];
    const std::int32_t* begin_b = tokens + offsets[b.second];
    const std::int32_t* end_a = tokens + offsets[a.second + 1];
    const std::int32_t* end_b = tokens + offsets[b.second + 1];
    const auto [at_a, at_b] = std::mismatch(begin_a, end_a, begin_b, end_b);
    if (at_a == end_a && at_b == end_b) return a.second < b.second;
    return at_a == end_a || (at_b != end_b && *at_a < *at_b);
  });
  std::transform(order.begin(), order.end(), candidates_.begin(), [](const auto& entry) { return entry.second; });
  for (std::int32_t leaf = 0; leaf < num_candidates; ++leaf) {
    leaves_[static_cast<std::size_t>(candidate(leaf))] = leaf;
  }

  // A node for the root, and one for every token that a sequence does not share with the one before it.
  std::int64_t num_nodes_needed = 1;
  for (std::int32_t leaf = 0; leaf < num_candidates; ++leaf) {
    const std::int32_t* begin = tokens + offsets[candidate(leaf)];
    const std::int32_t* end = tokens + offsets[candidate(leaf) + 1];
    const std::int32_t* shared_end = begin;
    if (leaf > 0) {
      const std::int32_t before = candidate(leaf - 1);
      shared_end = std::mismatch(begin, end, tokens + offsets[before], tokens + offsets[before + 1]).first;
    }
    num_nodes_needed += end - shared_end;
  }
  nodes_.reserve(static_cast<std::size_t>(num_nodes_needed));
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
    has_prefixes_ |= updated.low < updated.end_high && updated.num_children > 0;
    nodes_[static_cast<std::size_t>(parent)] = updated;
  }
}

std::pair<std::int32_t, std::int32_t> Trie::equal_leaves(std::int32_t leaf) const {
  std::int32_t index = kRoot;
  while (leaf >= node(index).end_high) index = child_by_leaf(index, leaf);
  return {node(index).low, node(index).end_high};
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
