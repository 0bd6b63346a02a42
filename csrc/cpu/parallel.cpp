#include "parallel.h"

#include <omp.h>

#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#  include <pthread.h>
#endif

namespace fastattn {
namespace {

bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

int max_threads() { return forked ? 1 : omp_get_max_threads(); }

void wait_for_turn(const int32_t* turn, int64_t mine) {
  // Turns come within microseconds, unless the thread before lost its processor: then this one gives its own away.
  constexpr int kSpins = 2000;
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
    if (spins >= kSpins) std::this_thread::yield();
  }
}

void pass_turn(int32_t* turn) { __atomic_store_n(turn, *turn + 1, __ATOMIC_RELEASE); }

#if defined(__SANITIZE_THREAD__)
void run_on_new_threads(int64_t threads, void (*run)(const void*), const void* body) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(run, body);
  run(body);
  for (std::thread& other : others) other.join();
}
#endif

void throw_out_of_memory() { throw std::bad_alloc(); }

}  // namespace fastattn
