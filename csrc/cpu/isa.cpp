#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(FASTATTN_HAS_AVX512)
#  include <cpuid.h>
#endif
#if defined(FASTATTN_HAS_AMX)
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace fastattn {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

#if defined(FASTATTN_HAS_AMX)
// Linux gives a process its tile registers on request only (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

bool runs_amx() {
  const std::vector<std::string> flags = cpu_flags();
  for (const char* needed : {"amx_tile", "amx_bf16", "avx512_bf16"}) {
    if (std::find(flags.begin(), flags.end(), needed) == flags.end()) return false;
  }
  return request_tiles();
}
#endif

bool runs(Isa isa) {
#if defined(FASTATTN_HAS_AVX512)
  // These builtins also ask the operating system (xgetbv) whether it saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
#if defined(FASTATTN_HAS_AMX)
  if (isa == Isa::kAmx) {
    static const bool amx = runs(Isa::kAvx512) && runs_amx();
    return amx;
  }
#endif
  return isa == Isa::kPortable;
}

Isa parse(const std::string& name) {
  for (Isa isa : kAll) {
    if (name == isa_name(isa)) {
      if (runs(isa)) return isa;
      throw std::runtime_error("instruction set '" + name + "' does not run on this machine or is not in this build");
    }
  }
  throw std::runtime_error("unknown instruction set '" + name + "': expected amx, avx512, avx2 or portable");
}

Isa choose() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced);
  return *std::find_if(std::rbegin(kAll), std::rend(kAll), runs);
}

std::atomic<int> current{-1};

}  // namespace

Isa current_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(choose());
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) { current.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll) {
    if (runs(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

std::vector<std::string> cpu_flags() {
  std::vector<std::string> flags;
#if defined(FASTATTN_HAS_AVX512)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    if (edx & (1u << 22)) flags.emplace_back("amx_bf16");
    if (edx & (1u << 23)) flags.emplace_back("avx512_fp16");
    if (edx & (1u << 24)) flags.emplace_back("amx_tile");
  }
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5))) flags.emplace_back("avx512_bf16");
#endif
  return flags;
}

}  // namespace fastattn
