#include "flexrec/phrase_matcher.hpp"

#include <algorithm>
#include <cstddef>

namespace flexrec {

namespace {

Trie reversed_trie(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_phrases) {
  const std::int64_t begin = offsets[0];
  std::vector<std::int32_t> reversed(tokens + begin, tokens + offsets[num_phrases]);
  std::vector<std::int64_t> reversed_offsets(static_cast<std::size_t>(num_phrases) + 1);
  for (std::int32_t k = 0; k < num_phrases; ++k) {
    std::reverse(reversed.begin() + (offsets[k] - begin), reversed.begin() + (offsets[k + 1] - begin));
    reversed_offsets[static_cast<std::size_t>(k) + 1] = offsets[k + 1] - begin;
  }
  return {reversed.data(), reversed_offsets.data(), num_phrases};
}

}  // namespace

PhraseMatcher::PhraseMatcher(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_phrases)
    : trie_(reversed_trie(tokens, offsets, num_phrases)),
      fallback_(static_cast<std::size_t>(trie_.num_nodes()), Trie::kRoot),
      longest_(static_cast<std::size_t>(trie_.num_nodes()), 0) {
  std::vector<std::int32_t> depths(static_cast<std::size_t>(trie_.num_nodes()), 0);
  // Nodes are numbered breadth first, so that a parent and every shorter node are ready before a child.
  for (std::int32_t parent = 0; parent < trie_.num_nodes(); ++parent) {
    const Trie::Node& node = trie_.node(parent);
    for (std::int32_t child = node.first_child; child < node.first_child + node.num_children; ++child) {
      const Trie::Node& next = trie_.node(child);
      const auto i = static_cast<std::size_t>(child);
      if (parent != Trie::kRoot) fallback_[i] = next_state(fallback_[static_cast<std::size_t>(parent)], next.token);
      depths[i] = depths[static_cast<std::size_t>(parent)] + 1;
      longest_[i] = next.low < next.end_high ? depths[i] : longest_[static_cast<std::size_t>(fallback_[i])];
    }
  }
}

std::int32_t PhraseMatcher::next_state(std::int32_t state, std::int64_t token) const {
  while (true) {
    const std::int32_t child = trie_.child_by_token(state, token);
    if (child != Trie::kNone) return child;
    if (state == Trie::kRoot) return Trie::kRoot;
    state = fallback_[static_cast<std::size_t>(state)];
  }
}

void PhraseMatcher::longest_lengths(const std::int64_t* text, std::int64_t size, std::int32_t* lengths) const {
  std::int32_t state = Trie::kRoot;
  for (std::int64_t i = size - 1; i >= 0; --i) {
    state = next_state(state, text[i]);
    lengths[i] = longest_[static_cast<std::size_t>(state)];
  }
}

}  // namespace flexrec
