// Which instruction set the kernels run on, chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace fastattn {

// Each contains those before it. AMX multiplies bfloat16 and has few kernels: the rest run on AVX-512.
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

// The instruction set in use: the best one this machine runs, or the one FASTATTN_CPU_ISA or set_isa() names.
// Throws std::runtime_error when FASTATTN_CPU_ISA names one that cannot run here.
Isa current_isa();
void set_isa(const std::string& name);

const char* isa_name(Isa isa);
std::vector<std::string> available_isas();  // that this machine runs and this build contains, slowest first
std::vector<std::string> cpu_flags();       // features kernels may ask for beyond the instruction set, e.g. "amx_bf16"

// Calls `fastattn::<isa>::name(...)` of the instruction set in use.
#if defined(FASTATTN_HAS_AVX512)
#  define FASTATTN_DISPATCH(name, ...)                                     \
    (::fastattn::current_isa() >= Isa::kAvx512 ? avx512::name(__VA_ARGS__) \
     : ::fastattn::current_isa() == Isa::kAvx2 ? avx2::name(__VA_ARGS__)   \
                                               : portable::name(__VA_ARGS__))
// Declares one kernel in the namespace of each instruction set.
#  define FASTATTN_DECLARE(declaration) \
    namespace avx512 {                  \
    declaration;                        \
    }                                   \
    namespace avx2 {                    \
    declaration;                        \
    }                                   \
    namespace portable {                \
    declaration;                        \
    }
#else
#  define FASTATTN_DISPATCH(name, ...) portable::name(__VA_ARGS__)
#  define FASTATTN_DECLARE(declaration) \
    namespace portable {                \
    declaration;                        \
    }
#endif

// The same, but with the AMX kernel where AMX is in use and the kernel takes these arguments.
#if defined(FASTATTN_HAS_AMX)
#  define FASTATTN_DISPATCH_AMX(name, args)                                              \
    (::fastattn::current_isa() == Isa::kAmx && amx::name##_takes(args) ? amx::name(args) \
                                                                       : FASTATTN_DISPATCH(name, args))
#  define FASTATTN_DECLARE_AMX(name, Args) \
    namespace amx {                        \
    bool name##_takes(const Args& args);   \
    void name(const Args& args);           \
    }
#else
#  define FASTATTN_DISPATCH_AMX(name, args) FASTATTN_DISPATCH(name, args)
#  define FASTATTN_DECLARE_AMX(name, Args)
#endif

}  // namespace fastattn
