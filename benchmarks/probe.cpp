// What this machine can do at most: reading memory, and multiplying and adding in registers.
//   probe read THREADS BYTES SECONDS   -> GB/s   (BYTES should be several times the last-level cache)
//   probe f32|bf16 THREADS SECONDS     -> GFLOP/s (bf16: dot products into float32 where the CPU has them, else f32)
// Compile with -O3 -march=native.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
typedef uint64_t U64Vector __attribute__((vector_size(WIDTH)));
typedef float F32Vector __attribute__((vector_size(WIDTH)));

constexpr int CHAINS = 12; // independent sums: enough to hide the latency of two FMA units

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once, again and again; returns the fastest round's seconds.
template <typename Work>
static double fastest(int num_threads, double seconds, Work work) {
    std::atomic<int> arrived{0}, round{0};
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (int t = 1; t < num_threads; t++) {
        threads.emplace_back([&, t] {
            for (int seen = 0;;) {
                while (round.load() == seen && !stop.load()) {
                    std::this_thread::yield();
                }
                if (stop.load()) {
                    return;
                }
                seen++;
                work(t);
                arrived++;
            }
        });
    }
    double best = 1e30;
    for (double end = now() + seconds; now() < end;) {
        arrived = 0;
        const double start = now();
        round++;
        work(0);
        while (arrived.load() < num_threads - 1) {
            std::this_thread::yield();
        }
        const double took = now() - start;
        best = took < best ? took : best;
    }
    stop = true;
    for (std::thread &thread : threads) {
        thread.join();
    }
    return best;
}

static std::atomic<uint64_t> sink; // what is computed must be used

static double readBandwidth(int num_threads, size_t bytes, double seconds) {
    const size_t share = bytes / num_threads / (WIDTH * CHAINS) * CHAINS; // vectors per thread
    std::vector<U64Vector *> parts(num_threads);
    for (U64Vector *&part : parts) {
        part = static_cast<U64Vector *>(std::aligned_alloc(4096, (share * WIDTH + 4095) / 4096 * 4096));
        if (!part) {
            std::fprintf(stderr, "probe: no memory for %zu bytes\n", bytes);
            std::exit(1);
        }
        std::memset(static_cast<void *>(part), 1, share * WIDTH);
    }
    const double took = fastest(num_threads, seconds, [&](int t) {
        U64Vector sums[CHAINS] = {};
        const U64Vector *data = parts[t];
        for (size_t i = 0; i < share; i += CHAINS) {
#pragma GCC unroll 16
            for (int c = 0; c < CHAINS; c++) {
                sums[c] ^= data[i + c];
            }
        }
        for (const U64Vector &sum : sums) {
            sink += sum[0] + sum[1];
        }
    });
    for (U64Vector *part : parts) {
        std::free(part);
    }
    return double(share) * WIDTH * num_threads / took / 1e9;
}

static double arithmetic(int num_threads, double seconds, bool bf16) {
    constexpr int ROUNDS = 100000;
    double flops = 2.0 * (WIDTH / 4) * CHAINS * ROUNDS * num_threads;
#ifdef __AVX512BF16__
    if (bf16) {
        flops *= 2; // each of the 16 lanes adds two products
        const double took = fastest(num_threads, seconds, [&](int t) {
            __m512 sums[CHAINS];
            const __m512bh a = (__m512bh)_mm512_set1_epi16(short(0x3f80 + t)), b = (__m512bh)_mm512_set1_epi16(0x3c00);
            for (int c = 0; c < CHAINS; c++) {
                sums[c] = _mm512_set1_ps(float(c));
            }
            for (int i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 16 // keeps the sums in registers
                for (int c = 0; c < CHAINS; c++) {
                    sums[c] = _mm512_dpbf16_ps(sums[c], a, b);
                }
            }
            for (const __m512 &sum : sums) {
                sink += uint64_t(sum[0]);
            }
        });
        return flops / took / 1e9;
    }
#endif
    (void)bf16;
    const double took = fastest(num_threads, seconds, [&](int t) {
        F32Vector sums[CHAINS] = {}, a = {}, b = {};
        a += 1.0f - 1e-6f * float(t + 1);
        b += 1e-6f;
        for (int c = 0; c < CHAINS; c++) {
            sums[c] += float(c); // all different: equal ones would be computed once
        }
        for (int i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 16
            for (int c = 0; c < CHAINS; c++) {
                sums[c] = sums[c] * a + b;
            }
        }
        for (const F32Vector &sum : sums) {
            sink += uint64_t(sum[0] + sum[1]);
        }
    });
    return flops / took / 1e9;
}

int main(int argc, char **argv) {
    const int num_threads = argc > 2 ? std::atoi(argv[2]) : 0;
    if (argc == 5 && !std::strcmp(argv[1], "read") && num_threads > 0) {
        std::printf("%.3f\n", readBandwidth(num_threads, std::strtoull(argv[3], nullptr, 10), std::atof(argv[4])));
        return 0;
    }
    if (argc == 4 && (!std::strcmp(argv[1], "f32") || !std::strcmp(argv[1], "bf16")) && num_threads > 0) {
        std::printf("%.3f\n", arithmetic(num_threads, std::atof(argv[3]), !std::strcmp(argv[1], "bf16")));
        return 0;
    }
    std::fprintf(stderr, "usage: probe read THREADS BYTES SECONDS | probe f32|bf16 THREADS SECONDS\n");
    return 2;
}
