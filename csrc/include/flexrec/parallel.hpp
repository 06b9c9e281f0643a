#pragma once

#include <cstdint>
#include <functional>

namespace flexrec {

// Calls work(begin, end) on disjoint ranges that cover [0, count), on several threads when `cost` (a rough number of
// elementary operations for all of it) repays starting them. The first exception thrown, by row order of the ranges,
// is rethrown after all threads have ended.
void parallel_for(std::int64_t count, std::int64_t cost,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& work);

}  // namespace flexrec
