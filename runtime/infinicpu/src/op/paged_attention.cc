// paged_attention (decode) and paged_attention_prefill: attention over a cache of blocks.

#include "../kernels/kernels.h"
#include "launch.h"
#include "thread_pool.h"

#include <infiniop/ops/paged_attention.h>
#include <infiniop/ops/paged_attention_prefill.h>

#include <algorithm>

using namespace infinicpu;

namespace {

// A decode's kv range is cut only where each part still has some tiles to work on.
constexpr size_t MIN_PART = 4 * ATTENTION_KV_TILE;
constexpr size_t MAX_PARTS = 64;

struct PagedDescriptor : InfiniopDescriptor {
    infiniDtype_t dtype, index_dtype;
    size_t seqs, heads, kv_heads, group, dim, value_dim, blocks, block_size, max_blocks;
    float scale;
    size_t parts = 1; // decode: the most parts that one sequence's kv range is cut into
};

struct PagedAttentionDescriptor final : PagedDescriptor {
    static constexpr const char *KIND = "paged_attention";
};

struct PagedAttentionPrefillDescriptor final : PagedDescriptor {
    static constexpr const char *KIND = "paged_attention_prefill";
};

bool isIndexDtype(infiniDtype_t dtype) {
    return isOneOf(dtype, {INFINI_DTYPE_I64, INFINI_DTYPE_I32, INFINI_DTYPE_U32});
}

// What decode and prefill check alike, in InfiniCore's order.
infiniStatus_t check(PagedDescriptor &d, const TensorDescriptor &out, const TensorDescriptor &q, const TensorDescriptor &k_cache, const TensorDescriptor &v_cache, const TensorDescriptor &block_tables, const TensorDescriptor &seq_lens, const TensorDescriptor *cum_seq_lens_q, const TensorDescriptor *alibi_slopes, float scale) {
    d.dtype = q.dtype;
    INFINICPU_REQUIRE(isOneOf(d.dtype, {INFINI_DTYPE_F16, INFINI_DTYPE_BF16, INFINI_DTYPE_F32}), INFINI_STATUS_BAD_TENSOR_DTYPE);
    INFINICPU_REQUIRE(out.dtype == d.dtype && k_cache.dtype == d.dtype && v_cache.dtype == d.dtype, INFINI_STATUS_BAD_TENSOR_DTYPE);
    INFINICPU_REQUIRE(q.ndim() == 3 && out.ndim() == 3 && k_cache.ndim() == 4 && v_cache.ndim() == 4, INFINI_STATUS_BAD_TENSOR_SHAPE);
    INFINICPU_REQUIRE(block_tables.ndim() == 2 && seq_lens.ndim() == 1 && (cum_seq_lens_q == nullptr || cum_seq_lens_q->ndim() == 1), INFINI_STATUS_BAD_TENSOR_SHAPE);
    INFINICPU_REQUIRE(q.stride(2) == 1 && out.stride(2) == 1 && k_cache.stride(3) == 1 && v_cache.stride(3) == 1, INFINI_STATUS_BAD_TENSOR_STRIDES);
    d.index_dtype = block_tables.dtype;
    INFINICPU_REQUIRE(isIndexDtype(d.index_dtype) && seq_lens.dtype == d.index_dtype && (cum_seq_lens_q == nullptr || cum_seq_lens_q->dtype == d.index_dtype), INFINI_STATUS_BAD_TENSOR_DTYPE);
    INFINICPU_REQUIRE((block_tables.dim(1) <= 1 || block_tables.stride(1) == 1) && seq_lens.isContiguous() && (cum_seq_lens_q == nullptr || cum_seq_lens_q->isContiguous()), INFINI_STATUS_BAD_TENSOR_STRIDES);
    if (alibi_slopes != nullptr) {
        INFINICPU_REQUIRE(alibi_slopes->dtype == INFINI_DTYPE_F32, INFINI_STATUS_BAD_TENSOR_DTYPE);
        INFINICPU_REQUIRE(alibi_slopes->ndim() == 1 && alibi_slopes->dim(0) == q.dim(1), INFINI_STATUS_BAD_TENSOR_SHAPE);
        INFINICPU_REQUIRE(alibi_slopes->isContiguous(), INFINI_STATUS_BAD_TENSOR_STRIDES);
    }
    d.seqs = seq_lens.dim(0);
    d.heads = q.dim(1);
    d.dim = q.dim(2);
    d.blocks = k_cache.dim(0);
    d.kv_heads = k_cache.dim(1);
    d.block_size = k_cache.dim(2);
    d.value_dim = v_cache.dim(3);
    d.max_blocks = block_tables.dim(1);
    d.scale = scale;
    INFINICPU_REQUIRE(d.kv_heads != 0 && d.heads % d.kv_heads == 0 && d.block_size != 0, INFINI_STATUS_BAD_TENSOR_SHAPE);
    d.group = d.heads / d.kv_heads;
    INFINICPU_REQUIRE(k_cache.dim(3) == d.dim && v_cache.dim(0) == d.blocks && v_cache.dim(1) == d.kv_heads && v_cache.dim(2) == d.block_size, INFINI_STATUS_BAD_TENSOR_SHAPE);
    INFINICPU_REQUIRE(out.dim(0) == q.dim(0) && out.dim(1) == d.heads && out.dim(2) == d.value_dim, INFINI_STATUS_BAD_TENSOR_SHAPE);
    INFINICPU_REQUIRE(block_tables.dim(0) == d.seqs, INFINI_STATUS_BAD_TENSOR_SHAPE);
    return INFINI_STATUS_SUCCESS;
}

// The operands' order at create, the same in both operators (prefill has the cumulative lengths before the slopes).
enum Operand { OUT,
               Q,
               K_CACHE,
               V_CACHE,
               BLOCK_TABLES,
               SEQ_LENS };

// The caller's pointers.
struct Data {
    void *out;
    const void *q, *k_cache, *v_cache, *block_tables, *seq_lens;
    const float *alibi_slopes;
};

const void *blockTable(const PagedDescriptor &d, const void *tables, size_t seq) {
    return static_cast<const char *>(tables) + ptrdiff_t(seq) * d.operands[BLOCK_TABLES].stride(0) * ptrdiff_t(sizeOf(d.index_dtype));
}

// The length must fit the table, and the blocks that it needs must exist.
infiniStatus_t checkSequence(const PagedDescriptor &d, const Data &data, size_t seq) {
    const int64_t length = readInteger(data.seq_lens, d.index_dtype, ptrdiff_t(seq));
    INFINICPU_REQUIRE(length >= 0 && (uint64_t(length) + d.block_size - 1) / d.block_size <= d.max_blocks, INFINI_STATUS_BAD_PARAM);
    const void *table = blockTable(d, data.block_tables, seq);
    for (size_t i = 0; i * d.block_size < size_t(length); ++i) {
        const int64_t block = readInteger(table, d.index_dtype, ptrdiff_t(i));
        INFINICPU_REQUIRE(block >= 0 && uint64_t(block) < d.blocks, INFINI_STATUS_BAD_PARAM);
    }
    return INFINI_STATUS_SUCCESS;
}

// Everything but which queries see which positions.
AttentionTask makeTask(const PagedDescriptor &d, const Data &data, size_t seq, size_t row, size_t kv_head) {
    const ptrdiff_t size = ptrdiff_t(sizeOf(d.dtype));
    const TensorDescriptor &q = d.operands[Q], &out = d.operands[OUT], &k = d.operands[K_CACHE], &v = d.operands[V_CACHE];
    AttentionTask t{};
    t.q = static_cast<const char *>(data.q) + (ptrdiff_t(row) * q.stride(0) + ptrdiff_t(kv_head * d.group) * q.stride(1)) * size;
    t.q_token = q.stride(0);
    t.q_head = q.stride(1);
    t.out = static_cast<char *>(data.out) + (ptrdiff_t(row) * out.stride(0) + ptrdiff_t(kv_head * d.group) * out.stride(1)) * size;
    t.out_token = out.stride(0);
    t.out_head = out.stride(1);
    t.tokens = 1;
    t.group = d.group;
    t.dim = d.dim;
    t.value_dim = d.value_dim;
    t.k = static_cast<const char *>(data.k_cache) + ptrdiff_t(kv_head) * k.stride(1) * size;
    t.v = static_cast<const char *>(data.v_cache) + ptrdiff_t(kv_head) * v.stride(1) * size;
    t.k_block = k.stride(0);
    t.k_row = k.stride(2);
    t.v_block = v.stride(0);
    t.v_row = v.stride(2);
    t.block_table = blockTable(d, data.block_tables, seq);
    t.block_table_dtype = d.index_dtype;
    t.block_size = d.block_size;
    t.scale = d.scale;
    t.alibi_slopes = data.alibi_slopes != nullptr ? data.alibi_slopes + kv_head * d.group : nullptr;
    return t;
}

infiniStatus_t decode(const PagedDescriptor &d, float *workspace, const Data &data) {
    for (size_t seq = 0; seq < d.seqs; ++seq) {
        const infiniStatus_t status = checkSequence(d, data, seq);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
    }
    const size_t row_floats = d.value_dim + 2;
    const auto kernel = kernels().attention[floatIndex(d.dtype)];
    const auto lengthOf = [&](size_t seq) { return size_t(readInteger(data.seq_lens, d.index_dtype, ptrdiff_t(seq))); };
    // Parts are whole tiles, cut by the sequence's own length.
    const auto partLength = [&](size_t length) {
        const size_t tiles = (length + ATTENTION_KV_TILE - 1) / ATTENTION_KV_TILE;
        const size_t wanted = std::max<size_t>(1, std::min(d.parts, length / MIN_PART));
        return std::max<size_t>(1, (tiles + wanted - 1) / wanted) * ATTENTION_KV_TILE;
    };
    std::atomic<bool> out_of_memory{false};
    parallelFor(0, d.seqs * d.kv_heads * d.parts, 1, [&](size_t from, size_t to) {
        void *scratch = threadScratch(attentionScratchBytes(d.group, d.dim, d.value_dim));
        if (scratch == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        for (size_t i = from; i < to; ++i) {
            const size_t part = i % d.parts;
            const size_t kv_head = i / d.parts % d.kv_heads;
            const size_t seq = i / d.parts / d.kv_heads;
            const size_t length = lengthOf(seq);
            const size_t step = partLength(length);
            if (part != 0 && part * step >= length) {
                continue;
            }
            AttentionTask t = makeTask(d, data, seq, seq, kv_head);
            t.kv_begin = part * step;
            t.kv_end = std::min(length, t.kv_begin + step);
            t.first_visible = length;
            t.scratch = scratch;
            t.partial = step < length ? workspace + (i * d.group) * row_floats : nullptr;
            kernel(t);
        }
    });
    if (out_of_memory.load()) {
        return INFINI_STATUS_INTERNAL_ERROR;
    }
    if (d.parts > 1) {
        parallelFor(0, d.seqs * d.heads, 16, [&](size_t from, size_t to) {
            for (size_t i = from; i < to; ++i) {
                const size_t seq = i / d.heads;
                const size_t head = i % d.heads;
                const size_t length = lengthOf(seq);
                const size_t step = partLength(length);
                if (step >= length) {
                    continue; // the kernel wrote the result itself
                }
                const size_t first = (seq * d.kv_heads + head / d.group) * d.parts;
                const float *partial = workspace + (first * d.group + head % d.group) * row_floats;
                const TensorDescriptor &out = d.operands[OUT];
                char *to_row = static_cast<char *>(data.out) + (ptrdiff_t(seq) * out.stride(0) + ptrdiff_t(head) * out.stride(1)) * ptrdiff_t(sizeOf(d.dtype));
                kernels().attention_merge[floatIndex(d.dtype)]((length + step - 1) / step, partial, d.group * row_floats, d.value_dim, to_row);
            }
        });
    }
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t prefill(const PagedDescriptor &d, uint64_t *first_blocks, const Data &data, const void *cum_seq_lens_q) {
    const size_t total_q = d.operands[Q].dim(0);
    const size_t tokens_per_block = std::max<size_t>(1, ATTENTION_MAX_ROWS / d.group);
    const auto start = [&](size_t seq) { return readInteger(cum_seq_lens_q, d.index_dtype, ptrdiff_t(seq)); };
    // first_blocks[seq]: query blocks of all sequences before it.
    first_blocks[0] = 0;
    for (size_t seq = 0; seq < d.seqs; ++seq) {
        const infiniStatus_t status = checkSequence(d, data, seq);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        const int64_t from = start(seq), to = start(seq + 1);
        INFINICPU_REQUIRE(from >= 0 && from <= to && uint64_t(to) <= total_q, INFINI_STATUS_BAD_PARAM);
        const int64_t length = readInteger(data.seq_lens, d.index_dtype, ptrdiff_t(seq));
        // Length 0 is padding; else the new tokens are part of the length.
        INFINICPU_REQUIRE(length == 0 || length >= to - from, INFINI_STATUS_BAD_PARAM);
        first_blocks[seq + 1] = first_blocks[seq] + (size_t(to - from) + tokens_per_block - 1) / tokens_per_block;
    }
    const auto kernel = kernels().attention[floatIndex(d.dtype)];
    std::atomic<bool> out_of_memory{false};
    // Later query blocks see more and take longer, so they come first: the last pieces to finish are short.
    const size_t tasks = size_t(first_blocks[d.seqs]) * d.kv_heads;
    parallelFor(0, tasks, 1, [&](size_t from, size_t to) {
        void *scratch = threadScratch(attentionScratchBytes(tokens_per_block * d.group, d.dim, d.value_dim));
        if (scratch == nullptr) {
            out_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        for (size_t i = from; i < to; ++i) {
            const size_t task = tasks - 1 - i;
            const size_t kv_head = task % d.kv_heads;
            const uint64_t block = task / d.kv_heads;
            const size_t seq = size_t(std::upper_bound(first_blocks, first_blocks + d.seqs + 1, block) - first_blocks) - 1;
            const size_t length = size_t(readInteger(data.seq_lens, d.index_dtype, ptrdiff_t(seq)));
            const size_t seq_start = size_t(start(seq));
            const size_t seq_tokens = size_t(start(seq + 1)) - seq_start;
            const size_t first = size_t(block - first_blocks[seq]) * tokens_per_block;
            AttentionTask t = makeTask(d, data, seq, seq_start + first, kv_head);
            t.tokens = std::min(tokens_per_block, seq_tokens - first);
            t.kv_begin = 0;
            t.kv_end = length;
            t.first_visible = length == 0 ? 0 : length - seq_tokens + first + 1;
            t.scratch = scratch;
            kernel(t);
        }
    });
    return out_of_memory.load() ? INFINI_STATUS_INTERNAL_ERROR : INFINI_STATUS_SUCCESS;
}

} // namespace

infiniStatus_t infiniopCreatePagedAttentionDescriptor(infiniopHandle_t handle, infiniopPagedAttentionDescriptor_t *desc_ptr, infiniopTensorDescriptor_t out_desc, infiniopTensorDescriptor_t q_desc, infiniopTensorDescriptor_t k_cache_desc, infiniopTensorDescriptor_t v_cache_desc, infiniopTensorDescriptor_t block_tables_desc, infiniopTensorDescriptor_t seq_lens_desc, infiniopTensorDescriptor_t alibi_slopes_desc, float scale) {
    return createOperator<PagedAttentionDescriptor>(handle, desc_ptr, {out_desc, q_desc, k_cache_desc, v_cache_desc, block_tables_desc, seq_lens_desc, OperandDesc(alibi_slopes_desc, true)}, [&](PagedAttentionDescriptor &d) {
        const infiniStatus_t status = check(d, *out_desc, *q_desc, *k_cache_desc, *v_cache_desc, *block_tables_desc, *seq_lens_desc, nullptr, alibi_slopes_desc, scale);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        INFINICPU_REQUIRE(q_desc->dim(0) == d.seqs, INFINI_STATUS_BAD_TENSOR_SHAPE);
        const size_t tasks = std::max<size_t>(1, d.seqs * d.kv_heads);
        const size_t threads = ThreadPool::instance().numThreads();
        if (tasks < 2 * threads && threads > 1) {
            const size_t longest = d.max_blocks * d.block_size;
            d.parts = std::max<size_t>(1, std::min({(2 * threads + tasks - 1) / tasks, longest / MIN_PART, MAX_PARTS}));
        }
        d.workspace_size = d.parts > 1 ? d.seqs * d.heads * d.parts * (d.value_dim + 2) * sizeof(float) : 0;
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(PagedAttention)

infiniStatus_t infiniopPagedAttention(infiniopPagedAttentionDescriptor_t desc, void *workspace, size_t workspace_size, void *out, const void *q, const void *k_cache, const void *v_cache, const void *block_tables, const void *seq_lens, const void *alibi_slopes, void *stream) {
    return launch<PagedAttentionDescriptor>(desc, workspace, workspace_size, {out, q, k_cache, v_cache, block_tables, seq_lens, alibi_slopes}, stream, [=](const PagedAttentionDescriptor &d) {
        return decode(d, static_cast<float *>(workspace), {out, q, k_cache, v_cache, block_tables, seq_lens, d.operands[SEQ_LENS + 1].present ? static_cast<const float *>(alibi_slopes) : nullptr});
    });
}

INFINICPU_DEFINE_DESTROY(PagedAttention)

infiniStatus_t infiniopCreatePagedAttentionPrefillDescriptor(infiniopHandle_t handle, infiniopPagedAttentionPrefillDescriptor_t *desc_ptr, infiniopTensorDescriptor_t out_desc, infiniopTensorDescriptor_t q_desc, infiniopTensorDescriptor_t k_cache_desc, infiniopTensorDescriptor_t v_cache_desc, infiniopTensorDescriptor_t block_tables_desc, infiniopTensorDescriptor_t seq_lens_desc, infiniopTensorDescriptor_t cum_seq_lens_q_desc, infiniopTensorDescriptor_t alibi_slopes_desc, float scale) {
    return createOperator<PagedAttentionPrefillDescriptor>(handle, desc_ptr, {out_desc, q_desc, k_cache_desc, v_cache_desc, block_tables_desc, seq_lens_desc, cum_seq_lens_q_desc, OperandDesc(alibi_slopes_desc, true)}, [&](PagedAttentionPrefillDescriptor &d) {
        const infiniStatus_t status = check(d, *out_desc, *q_desc, *k_cache_desc, *v_cache_desc, *block_tables_desc, *seq_lens_desc, cum_seq_lens_q_desc, alibi_slopes_desc, scale);
        INFINICPU_REQUIRE(status == INFINI_STATUS_SUCCESS, status);
        INFINICPU_REQUIRE(cum_seq_lens_q_desc->dim(0) == d.seqs + 1, INFINI_STATUS_BAD_PARAM);
        d.workspace_size = (d.seqs + 1) * sizeof(uint64_t);
        return INFINI_STATUS_SUCCESS;
    });
}

INFINICPU_DEFINE_WORKSPACE_SIZE(PagedAttentionPrefill)

infiniStatus_t infiniopPagedAttentionPrefill(infiniopPagedAttentionPrefillDescriptor_t desc, void *workspace, size_t workspace_size, void *out, const void *q, const void *k_cache, const void *v_cache, const void *block_tables, const void *seq_lens, const void *cum_seq_lens_q, const void *alibi_slopes, void *stream) {
    return launch<PagedAttentionPrefillDescriptor>(desc, workspace, workspace_size, {out, q, k_cache, v_cache, block_tables, seq_lens, cum_seq_lens_q, alibi_slopes}, stream, [=](const PagedAttentionPrefillDescriptor &d) {
        return prefill(d, static_cast<uint64_t *>(workspace), {out, q, k_cache, v_cache, block_tables, seq_lens, d.operands[SEQ_LENS + 2].present ? static_cast<const float *>(alibi_slopes) : nullptr}, cum_seq_lens_q);
    });
}

INFINICPU_DEFINE_DESTROY(PagedAttentionPrefill)
