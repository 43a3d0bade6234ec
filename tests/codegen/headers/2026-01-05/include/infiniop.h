#pragma once
#include "infiniop/ops/add_rms_norm.h"
#include "infiniop/ops/logsoftmax.h"
#include "infiniop/ops/paged_attention_prefill.h"
#include "infiniop/ops/paged_caching.h"
#include "infiniop/ops/rope.h"
