// Every operator and every infinirt function once per dtype and some odd shapes, for the sanitizers. What the results
// must be is tested elsewhere; here they must be computed without touching a byte that is not theirs.

#include "harness.hpp"

#include <cmath>

namespace {

using Shape = std::vector<size_t>;
using Strides = std::vector<ptrdiff_t>;

void gemms(infiniopHandle_t handle, infiniDtype_t t) {
    const size_t sizes[][3] = {{1, 1, 1}, {1, 37, 65}, {3, 7, 31}, {5, 50, 1100}, {14, 26, 600}, {33, 70, 130}, {2, 9, 0}, {0, 5, 3}};
    for (const auto &[m, n, k] : sizes) {
        Tensor a(t, {m, k}), weight(t, {k, n}, {1, ptrdiff_t(k)}), plain(t, {k, n}), c(t, {m, n});
        RUN(Gemm, handle, (c.desc(), a.desc(), weight.desc()), (c.data(), a.data(), weight.data(), 1.0f, 0.0f));
        RUN(Gemm, handle, (c.desc(), a.desc(), plain.desc()), (c.data(), a.data(), plain.data(), 0.5f, 1.0f));
        // column-major everything
        Tensor at(t, {m, k}, {1, ptrdiff_t(m)}), ct(t, {m, n}, {1, ptrdiff_t(m)});
        if (m != 0 && k != 0) {
            RUN(Gemm, handle, (ct.desc(), at.desc(), plain.desc()), (ct.data(), at.data(), plain.data(), 1.0f, 0.0f));
            RUN(Gemm, handle, (c.desc(), at.desc(), weight.desc()), (c.data(), at.data(), weight.data(), 1.0f, 0.0f));
        }
    }
    Tensor a(t, {3, 4, 17}), b(t, {1, 17, 19}), c(t, {3, 4, 19});
    RUN(Gemm, handle, (c.desc(), a.desc(), b.desc()), (c.data(), a.data(), b.data(), 1.0f, 0.0f));
}

void rows(infiniopHandle_t handle, infiniDtype_t t) {
    for (const size_t dim : {1, 15, 16, 33, 260}) {
        const Strides gaps = {ptrdiff_t(dim) + 3, 1};
        Tensor x(t, {5, dim}, gaps), y(t, {5, dim}), r(t, {5, dim}, gaps), w(t, {dim});
        RUN(RMSNorm, handle, (y.desc(), x.desc(), w.desc(), 1e-6f), (y.data(), x.data(), w.data()));
        RUN(AddRMSNorm, handle, (y.desc(), r.desc(), x.desc(), y.desc(), w.desc(), 1e-6f), (y.data(), r.data(), x.data(), y.data(), w.data()));
        RUN(Add, handle, (y.desc(), x.desc(), r.desc()), (y.data(), x.data(), r.data()));
        RUN(Mul, handle, (y.desc(), x.desc(), r.desc()), (y.data(), x.data(), r.data()));
        RUN(SwiGLU, handle, (y.desc(), x.desc(), r.desc()), (y.data(), x.data(), r.data()));
        RUN(Silu, handle, (y.desc(), x.desc()), (y.data(), x.data()));
        Tensor both(t, {5, 2 * dim});
        RUN(SiluAndMul, handle, (y.desc(), both.desc()), (y.data(), both.data()));
        Tensor transposed(t, {5, dim}, {1, 7});
        RUN_WITHOUT_WORKSPACE(Rearrange, handle, (transposed.desc(), x.desc()), (transposed.data(), x.data()));
        RUN(Add, handle, (y.desc(), transposed.desc(), r.desc()), (y.data(), transposed.data(), r.data()));
        Tensor table(t, {11, dim}), ids(INFINI_DTYPE_I64, {5});
        RUN_WITHOUT_WORKSPACE(Embedding, handle, (y.desc(), ids.desc(), table.desc()), (y.data(), ids.data(), table.data()));
        Tensor heads(t, {3, 2, 2 * dim}), sines(t, {4, dim}), positions(INFINI_DTYPE_I32, {3});
        for (const auto algo : {INFINIOP_ROPE_ALGO_GPT_J, INFINIOP_ROPE_ALGO_GPT_NEOX}) {
            RUN(RoPE, handle, (heads.desc(), heads.desc(), positions.desc(), sines.desc(), sines.desc(), algo), (heads.data(), heads.data(), positions.data(), sines.data(), sines.data()));
        }
        Tensor scores(t, {2, 3, dim + 3}), strided(t, {2, 3, dim + 3}, {1, 2, 6});
        RUN(CausalSoftmax, handle, (scores.desc(), scores.desc()), (scores.data(), scores.data()));
        RUN(CausalSoftmax, handle, (strided.desc(), scores.desc()), (strided.data(), scores.data()));
        Tensor logits(t, {dim}), index(INFINI_DTYPE_I32, {});
        for (const float random : {0.0f, 0.4f, 1.0f}) {
            for (const int topk : {1, 3, -1}) {
                RUN(RandomSample, handle, (index.desc(), logits.desc()), (index.data(), logits.data(), random, 0.9f, topk, 0.8f));
                CHECK(*index.as<int32_t>() >= 0 && size_t(*index.as<int32_t>()) < dim);
            }
        }
    }
}

void attentions(infiniopHandle_t handle, infiniDtype_t t) {
    for (const size_t dim : {5, 16, 40}) {
        constexpr size_t BLOCK = 7, BLOCKS = 60, KV_HEADS = 2, HEADS = 6, TABLE = 50;
        Tensor k_cache(t, {BLOCKS, KV_HEADS, BLOCK, dim}), v_cache(t, {BLOCKS, KV_HEADS, BLOCK, dim});
        Tensor tables(INFINI_DTYPE_I32, {2, TABLE}), lengths(INFINI_DTYPE_I32, {2}), starts(INFINI_DTYPE_I32, {3});
        std::vector<int64_t> entries(2 * TABLE);
        for (size_t i = 0; i < entries.size(); ++i) {
            entries[i] = int64_t(i * 7 % BLOCKS);
        }
        tables.setIntegers(entries);
        const float scale = 1.0f / std::sqrt(float(dim));
        Tensor slopes(INFINI_DTYPE_F32, {HEADS});
        for (const std::vector<int64_t> &length : {std::vector<int64_t>{0, 9}, {350, 64}, {1, 130}}) {
            lengths.setIntegers(length);
            Tensor q(t, {2, HEADS, dim}), out(t, {2, HEADS, dim});
            RUN(PagedAttention, handle, (out.desc(), q.desc(), k_cache.desc(), v_cache.desc(), tables.desc(), lengths.desc(), nullptr, scale),
                (out.data(), q.data(), k_cache.data(), v_cache.data(), tables.data(), lengths.data(), nullptr));
            const int64_t first = length[0], second = std::min<int64_t>(length[1], 8);
            starts.setIntegers({0, first, first + second});
            Tensor qs(t, {size_t(first + second), HEADS, dim}), outs(t, {size_t(first + second), HEADS, dim});
            RUN(PagedAttentionPrefill, handle, (outs.desc(), qs.desc(), k_cache.desc(), v_cache.desc(), tables.desc(), lengths.desc(), starts.desc(), slopes.desc(), scale),
                (outs.data(), qs.data(), k_cache.data(), v_cache.data(), tables.data(), lengths.data(), starts.data(), slopes.data()));
        }
        Tensor k(t, {3, KV_HEADS, dim}), v(t, {3, KV_HEADS, dim}), slots(INFINI_DTYPE_I64, {3});
        slots.setIntegers({-1, 0, int64_t(BLOCKS * BLOCK - 1)});
        RUN(PagedCaching, handle, (k_cache.desc(), v_cache.desc(), k.desc(), v.desc(), slots.desc()), (k_cache.data(), v_cache.data(), k.data(), v.data(), slots.data()));

        Tensor kc(t, {2, KV_HEADS, 9, dim}), vc(t, {2, KV_HEADS, 9, dim}), ks(t, {2, KV_HEADS, 4, dim}), past(INFINI_DTYPE_I64, {2});
        past.setIntegers({0, 5});
        RUN(KVCaching, handle, (kc.desc(), vc.desc(), ks.desc(), ks.desc(), past.desc()), (kc.data(), vc.data(), ks.data(), ks.data(), past.data()));

        Tensor q1(t, {HEADS, 4, dim}), k1(t, {KV_HEADS, 4, dim}), c1(t, {KV_HEADS, 70, dim}), c2(t, {KV_HEADS, 70, dim}), o1(t, {4, HEADS, dim});
        RUN(Attention, handle, (o1.desc(), q1.desc(), k1.desc(), k1.desc(), c1.desc(), c2.desc(), 66), (o1.data(), q1.data(), k1.data(), k1.data(), c1.data(), c2.data()));
    }
}

void runtimeCalls() {
    OK(infinirtInit());
    int counts[INFINI_DEVICE_TYPE_COUNT];
    OK(infinirtGetAllDeviceCount(counts));
    CHECK(counts[INFINI_DEVICE_CPU] >= 1);
    for (const size_t size : {size_t(1), size_t(4096), size_t(9) << 20}) {
        void *a, *b;
        OK(infinirtMalloc(&a, size));
        OK(infinirtMallocHost(&b, size));
        OK(infinirtMemset(a, 3, size));
        OK(infinirtMemcpy(b, a, size, INFINIRT_MEMCPY_D2H));
        CHECK(static_cast<char *>(b)[size - 1] == 3);
        OK(infinirtFree(a));
        OK(infinirtFreeHost(b));
    }
    infinirtStream_t stream;
    infinirtEvent_t start, end;
    OK(infinirtStreamCreate(&stream));
    OK(infinirtEventCreate(&start));
    OK(infinirtEventCreateWithFlags(&end, INFINIRT_EVENT_BLOCKING_SYNC));
    OK(infinirtEventRecord(start, stream));
    OK(infinirtEventRecord(end, stream));
    OK(infinirtStreamWaitEvent(stream, end));
    float ms;
    OK(infinirtEventElapsedTime(&ms, start, end));
    CHECK(ms >= 0);
    OK(infinirtEventDestroy(start));
    OK(infinirtEventDestroy(end));
    OK(infinirtStreamDestroy(stream));
    infinicclComm_t comm;
    const int device = 0;
    OK(infinicclCommInitAll(INFINI_DEVICE_CPU, &comm, 1, &device));
    float x = 1, y = 0;
    OK(infinicclAllReduce(&x, &y, 1, INFINI_DTYPE_F32, INFINICCL_SUM, comm, nullptr));
    CHECK(y == 1);
    OK(infinicclCommDestroy(comm));
}

} // namespace

int main() {
    runtimeCalls();
    const infiniopHandle_t handle = makeHandle();
    for (const infiniDtype_t dtype : {INFINI_DTYPE_F32, INFINI_DTYPE_F16, INFINI_DTYPE_BF16}) {
        gemms(handle, dtype);
        rows(handle, dtype);
        attentions(handle, dtype);
    }
    OK(infiniopDestroyHandle(handle));
    infinicpuCounters_t counters;
    OK(infinicpuCounters(&counters));
    CHECK(counters.operators_alive == 0 && counters.tensors_alive == 0 && counters.allocations_alive == 0);
    std::printf("%s: %llu calls\n", infinicpuIsa(), static_cast<unsigned long long>(counters.calls));
    return 0;
}
