// Chooses the kernels when the library is loaded: the best instruction set that the machine has and INFINICPU_ISA allows.

#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace infinicpu {

extern const Kernels KERNELS_portable;
extern const Kernels KERNELS_avx2;
extern const Kernels KERNELS_avx512;
extern const Kernels KERNELS_avx512_bf16;

namespace {

struct Candidate {
    const Kernels *kernels;
    bool available;
};

const Kernels &choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                                      && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    [[maybe_unused]] const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    // The best first. Which of them were compiled is up to the build.
    const Candidate candidates[] = {
#ifdef INFINICPU_HAS_AVX512_BF16
        {&KERNELS_avx512_bf16, avx512_bf16},
#endif
#ifdef INFINICPU_HAS_AVX512
        {&KERNELS_avx512, avx512},
#endif
#ifdef INFINICPU_HAS_AVX2
        {&KERNELS_avx2, avx2},
#endif
        {&KERNELS_portable, true},
    };
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
