#include "parallel.h"

#include <omp.h>

#include <new>

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

void throw_out_of_memory() { throw std::bad_alloc(); }

}  // namespace fastattn
