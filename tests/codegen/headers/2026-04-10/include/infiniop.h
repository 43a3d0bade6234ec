#pragma once
#include "infiniop/ops/add_rms_norm.h"
#include "infiniop/ops/embedding.h"
#include "infiniop/ops/log_softmax.h"
#include "infiniop/ops/paged_attention.h"
#include "infiniop/ops/paged_attention_prefill.h"
#include "infiniop/ops/paged_caching.h"
