#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexrec/parallel.hpp"

namespace flexrec {

// Rows of different length: row i is ids[offsets[i]] .. ids[offsets[i + 1] - 1].
struct Csr {
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> offsets;
};

// Turns counts[i] into offsets: the result begins with 0 and has one entry more.
inline std::vector<std::int64_t> offsets_from_counts(const std::vector<std::int64_t>& counts) {
  std::vector<std::int64_t> offsets(counts.size() + 1, 0);
  for (std::size_t i = 0; i < counts.size(); ++i) offsets[i + 1] = offsets[i] + counts[i];
  return offsets;
}

}  // namespace flexrec
