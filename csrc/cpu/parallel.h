// Threads: OpenMP, so that the kernels share torch's pool and obey torch.set_num_threads.
#pragma once

#include <cstdint>

namespace fastattn {

// Threads the caller may use: OpenMP's setting, but 1 in a forked child, where the pool's threads no longer exist and
// waking them would hang.
int max_threads();

// Orders what threads add to the same memory: each waits until the turn is its own, adds, and passes it on. What the
// one before wrote is then visible.
void wait_for_turn(const int32_t* turn, int64_t mine);
void pass_turn(int32_t* turn);

#if defined(__SANITIZE_THREAD__)
// Calls run(body) on the caller's thread and on `threads` - 1 new ones, and joins those.
void run_on_new_threads(int64_t threads, void (*run)(const void*), const void* body);
#endif

// Reports what went wrong inside a parallel region, out of which no exception may travel.
[[noreturn]] void throw_out_of_memory();

#if defined(FASTATTN_ISA)
namespace FASTATTN_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Runs run() once on each of `threads` threads, of which the caller is one, and returns when all are done.
template <typename Run>
void run_on_threads(int64_t threads, const Run& run) {
#  if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see how OpenMP's threads, uninstrumented, wait for each other; it does see these.
  run_on_new_threads(threads, [](const void* body) { (*static_cast<const Run*>(body))(); }, &run);
#  else
#    pragma omp parallel num_threads(threads)
  run();
#  endif
}

// Runs body(task) for each task in [0, tasks), the next free thread taking the next task; put the longest first.
// A task must not depend on which thread runs it: that makes results the same at every thread count. `work` is about
// what all tasks cost, in multiply-adds or bytes: below 1e5 waking the pool costs more than it brings.
template <typename Body>
void parallel_for(int64_t tasks, double work, const Body& body) {
  const int64_t threads = work < 1e5 ? 1 : min(tasks, max_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  int64_t next = 0;
  bool failed = false;
  run_on_threads(threads, [&] {
    try {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) body(task);
    } catch (...) {  // only scratch() throws: std::bad_alloc
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
  });
  if (failed) throw_out_of_memory();
}

// Runs body(state, task) for each task in [0, tasks), begun in ascending order, so that a task may wait for the turn of
// one before it. Each thread calls prepare() once for its state, the only thing that may throw: where it does, the
// other threads do the work. `work` is parallel_for's.
template <typename Prepare, typename Body>
void parallel_in_order(int64_t tasks, double work, const Prepare& prepare, const Body& body) {
  int64_t next = 0;
  const auto run = [&] {
    try {
      const auto state = prepare();
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) body(state, task);
    } catch (...) {
    }
  };
  const int64_t threads = work < 1e5 ? 1 : min(tasks, max_threads());
  if (threads <= 1) {
    run();
  } else {
    run_on_threads(threads, run);
  }
  if (next < tasks) throw_out_of_memory();
}

}  // namespace FASTATTN_ISA
#endif

}  // namespace fastattn
