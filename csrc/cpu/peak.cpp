#include "peak.h"

#include "stream.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr double kAll = 1e9;                  // work enough for every thread
constexpr int64_t kTasksPerThread = 8;        // so that a thread that comes late costs little
constexpr int64_t kBlock = int64_t{1} << 20;  // bytes

}  // namespace

double multiply_add_peak(int64_t rounds) {
  // 2 units x 4 cycles of latency want 8 chains in flight; 12 leave room for an uneven start.
  constexpr int kChains = 12;
  const int64_t tasks = kTasksPerThread * max_threads();
  parallel_for(tasks, kAll, [&](int64_t) {
    FloatVec chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = FloatVec::set1(static_cast<float>(c));
    const FloatVec factor = FloatVec::set1(0.5f), term = FloatVec::set1(1.0f);  // all go to 2
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) chain[c] = fma(chain[c], factor, term);
    }
    FloatVec sum = FloatVec::zero();
    for (int c = 0; c < kChains; ++c) sum = sum + chain[c];
    float kept[FloatVec::kWidth];
    store(kept, sum);
    asm volatile("" ::"m"(kept));  // what is not used would not be computed
  });
  return static_cast<double>(tasks) * static_cast<double>(rounds) * kChains * FloatVec::kWidth * 2;
}

void read_memory(const StreamArgs& args) {
  constexpr int W = FloatVec::kWidth;
  parallel_for(ceil_div(args.bytes, kBlock), kAll, [&](int64_t block) {
    const float* from = reinterpret_cast<const float*>(static_cast<const char*>(args.from) + block * kBlock);
    const int64_t count = min(kBlock, args.bytes - block * kBlock) / static_cast<int64_t>(sizeof(float));
    FloatVec largest[4];
    for (FloatVec& x : largest) x = FloatVec::zero();
    for (int64_t i = 0; i < count; i += 4 * W) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) largest[k] = max(load(from + i + k * W), largest[k]);
    }
    float kept[W];
    store(kept, max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    asm volatile("" ::"m"(kept));
  });
}

void copy_memory(const StreamArgs& args) {
  constexpr int W = FloatVec::kWidth;
  parallel_for(ceil_div(args.bytes, kBlock), kAll, [&](int64_t block) {
    const float* from = reinterpret_cast<const float*>(static_cast<const char*>(args.from) + block * kBlock);
    float* to = reinterpret_cast<float*>(static_cast<char*>(args.to) + block * kBlock);
    const int64_t count = min(kBlock, args.bytes - block * kBlock) / static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i < count; i += W) stream(to + i, load(from + i));
    stream_end();
  });
}

}  // namespace fastattn::FASTATTN_ISA
