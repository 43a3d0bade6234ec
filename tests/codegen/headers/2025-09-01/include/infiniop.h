#ifndef INFINIOP_H_
#define INFINIOP_H_

#include "infiniop/ops/causal_softmax.h"
#include "infiniop/ops/gemm.h"
#include "infiniop/ops/rope.h"

#endif
