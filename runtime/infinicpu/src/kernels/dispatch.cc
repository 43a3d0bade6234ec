// Chooses the kernels when the library is loaded: the best instruction set that the machine has and INFINICPU_ISA allows.

#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace infinicpu {

extern const Kernels KERNELS_portable;
#ifdef INFINICPU_X86
extern const Kernels KERNELS_avx2;
extern const Kernels KERNELS_avx512;
extern const Kernels KERNELS_avx512_bf16;
#endif

namespace {

const Kernels &choose() {
    struct Candidate {
        const Kernels *kernels;
        bool available;
    };
#ifdef INFINICPU_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                     && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const Candidate candidates[] = {
        {&KERNELS_avx512_bf16, avx512_bf16},
        {&KERNELS_avx512, avx512},
        {&KERNELS_avx2, avx2},
        {&KERNELS_portable, true},
    };
#else
    const Candidate candidates[] = {{&KERNELS_portable, true}};
#endif
    const char *limit = std::getenv("INFINICPU_ISA");
    bool allowed = limit == nullptr || *limit == '\0';
    for (const Candidate &candidate : candidates) {
        allowed = allowed || std::strcmp(limit, candidate.kernels->name) == 0;
        if (allowed && candidate.available) {
            return *candidate.kernels;
        }
    }
    return KERNELS_portable;
}

const Kernels &CHOSEN = choose();

} // namespace

const Kernels &kernels() {
    return CHOSEN;
}

} // namespace infinicpu
