#ifndef INFINICPU_INFINIOP_HANDLE_H_
#define INFINICPU_INFINIOP_HANDLE_H_

#include "../infinicore.h"

struct InfiniopHandle;
typedef struct InfiniopHandle *infiniopHandle_t;

/** A handle remembers the calling thread's current device; operators created from it run there. */
__INFINI_C __export infiniStatus_t infiniopCreateHandle(infiniopHandle_t *handle_ptr);
__INFINI_C __export infiniStatus_t infiniopDestroyHandle(infiniopHandle_t handle);

#endif // INFINICPU_INFINIOP_HANDLE_H_
