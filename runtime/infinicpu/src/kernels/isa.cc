// Compiled once per instruction set, with INFINICPU_ISA naming it; the compiler's flags select the code in simd.h.

#include "attention_kernels.h"
#include "gemm_dot.h"
#include "gemm_kernels.h"
#include "row_kernels.h"

#define INFINICPU_CONCAT_(A, B) A##B
#define INFINICPU_CONCAT(A, B) INFINICPU_CONCAT_(A, B)
#define INFINICPU_STRING_(A) #A
#define INFINICPU_STRING(A) INFINICPU_STRING_(A)

namespace infinicpu {

namespace {

#if defined(__AVX512BF16__)
using Bf16Dot = Bf16Product;
#else
using Bf16Dot = FloatProduct<float, BF16>;
#endif

template <class Product, class T>
constexpr DotKernel dotKernel() {
    return {DOT_ROWS, Product::STEP, sizeof(typename Product::A), packDotRows<Product, T>, dotScratchBytes<Product>, dotPanelColumns<Product>, gemmDot<Product, T>};
}

} // namespace

extern const Kernels INFINICPU_CONCAT(KERNELS_, INFINICPU_ISA);
const Kernels INFINICPU_CONCAT(KERNELS_, INFINICPU_ISA) = {
    INFINICPU_STRING(INFINICPU_ISA),
    {dotKernel<FloatProduct<float, float>, float>(), dotKernel<FloatProduct<float, F16>, F16>(), dotKernel<Bf16Dot, BF16>()},
    {gemmOuter<float, float>, gemmOuter<F16, F16>, gemmOuter<BF16, BF16>},
    {{rmsNorm<float, float>, rmsNorm<float, F16>, rmsNorm<float, BF16>},
     {rmsNorm<F16, float>, rmsNorm<F16, F16>, rmsNorm<F16, BF16>},
     {rmsNorm<BF16, float>, rmsNorm<BF16, F16>, rmsNorm<BF16, BF16>}},
    {{addRmsNorm<float, float>, addRmsNorm<float, F16>, addRmsNorm<float, BF16>},
     {addRmsNorm<F16, float>, addRmsNorm<F16, F16>, addRmsNorm<F16, BF16>},
     {addRmsNorm<BF16, float>, addRmsNorm<BF16, F16>, addRmsNorm<BF16, BF16>}},
    {{ropeGptJ<float>, ropeNeox<float>}, {ropeGptJ<F16>, ropeNeox<F16>}, {ropeGptJ<BF16>, ropeNeox<BF16>}},
    {softmaxRow<float>, softmaxRow<F16>, softmaxRow<BF16>},
    {binaryRow<float, AddOp>, binaryRow<F16, AddOp>, binaryRow<BF16, AddOp>},
    {binaryRow<float, MulOp>, binaryRow<F16, MulOp>, binaryRow<BF16, MulOp>},
    {siluRow<float>, siluRow<F16>, siluRow<BF16>},
    {binaryRow<float, SwigluOp>, binaryRow<F16, SwigluOp>, binaryRow<BF16, SwigluOp>},
    {toF32Row<float>, toF32Row<F16>, toF32Row<BF16>},
    {attention<float>, attention<F16>, attention<BF16>},
    {attentionMerge<float>, attentionMerge<F16>, attentionMerge<BF16>},
    maxValue,
    softmaxWeights,
};

} // namespace infinicpu
