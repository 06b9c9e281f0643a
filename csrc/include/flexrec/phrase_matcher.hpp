#pragma once

#include <cstdint>
#include <vector>

#include "flexrec/trie.hpp"

namespace flexrec {

// Finds the longest of a set of phrases that begins at each position of a text, in O(text).
//
// An Aho-Corasick automaton (Aho and Corasick 1975) over the reversed phrases that reads the text from its end: what
// is the longest phrase ending here for the reversed text is the longest phrase beginning here for the text.
class PhraseMatcher {
 public:
  // Phrase k is tokens[offsets[k]] .. tokens[offsets[k + 1] - 1], not empty.
  PhraseMatcher(const std::int32_t* tokens, const std::int64_t* offsets, std::int32_t num_phrases);

  // lengths[i] = the length of the longest phrase that begins at text[i], or 0.
  void longest_lengths(const std::int64_t* text, std::int64_t size, std::int32_t* lengths) const;

 private:
  std::int32_t next_state(std::int32_t state, std::int64_t token) const;

  Trie trie_;                           // of the reversed phrases
  std::vector<std::int32_t> fallback_;  // by node: the node of the longest proper suffix of what the node spells
  std::vector<std::int32_t> longest_;   // by node: the length of the longest phrase that what the node spells ends with
};

}  // namespace flexrec
