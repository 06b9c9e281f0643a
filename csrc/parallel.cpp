#include "flexrec/parallel.hpp"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace flexrec {

namespace {
// Starting a thread costs some tens of microseconds: as much as about this many elementary operations.
constexpr std::int64_t kOperationsPerThread = 200'000;
}  // namespace

void parallel_for(std::int64_t count, std::int64_t cost,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& work) {
  std::int64_t num_threads = std::min(count, cost / kOperationsPerThread);
  // Asked only when it matters: the answer takes a system call, longer than a small state's whole step.
  if (num_threads > 1) num_threads = std::min<std::int64_t>(num_threads, std::thread::hardware_concurrency());
  if (num_threads <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(num_threads));
  const auto run_part = [&](std::int64_t part) {
    try {
      work(count * part / num_threads, count * (part + 1) / num_threads);
    } catch (...) {
      failures[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(num_threads - 1));
  std::int64_t started = 1;  // part 0 is done by this thread
  try {
    for (; started < num_threads; ++started) threads.emplace_back(run_part, started);
  } catch (const std::exception&) {
    // No more threads to be had: the remaining parts are done here.
  }
  run_part(0);
  for (std::int64_t part = started; part < num_threads; ++part) run_part(part);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace flexrec
