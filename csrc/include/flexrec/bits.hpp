#pragma once

#include <cstdint>

#ifdef _MSC_VER
#include <intrin.h>
#endif

// Sets of small integers as arrays of 64-bit words, asked about half-open ranges [low, high).
namespace flexrec::bits {

using Word = std::uint64_t;

constexpr std::int32_t kWordBits = 64;

inline std::int32_t words_for(std::int32_t size) { return (size + kWordBits - 1) / kWordBits; }

inline std::int32_t lowest_bit(Word word) {
#ifdef _MSC_VER
  unsigned long index = 0;
  _BitScanForward64(&index, word);
  return static_cast<std::int32_t>(index);
#else
  return __builtin_ctzll(word);
#endif
}

inline bool test(const Word* set, std::int32_t i) { return (set[i / kWordBits] >> (i % kWordBits)) & 1U; }
inline void insert(Word* set, std::int32_t i) { set[i / kWordBits] |= Word{1} << (i % kWordBits); }
inline void erase(Word* set, std::int32_t i) { set[i / kWordBits] &= ~(Word{1} << (i % kWordBits)); }

inline void insert_all(Word* set, std::int32_t size) {
  for (std::int32_t w = 0; w < words_for(size); ++w) set[w] = ~Word{0};
  if (size % kWordBits != 0) set[size / kWordBits] = (Word{1} << (size % kWordBits)) - 1;
}

// The members of `set` within word `w` that lie in the non-empty range [low, high).
inline Word masked_word(const Word* set, std::int32_t w, std::int32_t low, std::int32_t high) {
  Word word = set[w];
  if (w == low / kWordBits) word &= ~Word{0} << (low % kWordBits);
  if (w == (high - 1) / kWordBits) word &= ~Word{0} >> (kWordBits - 1 - (high - 1) % kWordBits);
  return word;
}

// The smallest member in the range, or -1.
inline std::int32_t first(const Word* set, std::int32_t low, std::int32_t high) {
  if (low >= high) return -1;
  for (std::int32_t w = low / kWordBits; w <= (high - 1) / kWordBits; ++w) {
    if (const Word word = masked_word(set, w, low, high)) return w * kWordBits + lowest_bit(word);
  }
  return -1;
}

inline bool any(const Word* set, std::int32_t low, std::int32_t high) {
  // Most ranges are single members: below most branches lies one item.
  return high - low == 1 ? test(set, low) : first(set, low, high) >= 0;
}

// Calls visit(member) for the members in the range, ascending.
template <class Visit>
void for_each(const Word* set, std::int32_t low, std::int32_t high, Visit&& visit) {
  if (low >= high) return;
  for (std::int32_t w = low / kWordBits; w <= (high - 1) / kWordBits; ++w) {
    for (Word word = masked_word(set, w, low, high); word != 0; word &= word - 1) {
      visit(w * kWordBits + lowest_bit(word));
    }
  }
}

}  // namespace flexrec::bits
