#pragma once
// Copies keys and values into their caches. Called as infiniopPagedCaching(desc, workspace, size, k, v, ...).
__C __export infiniStatus_t infiniopCreatePagedCachingDescriptor(
    infiniopHandle_t handle,
    infiniopPagedCachingDescriptor_t *desc_ptr,
    infiniopTensorDescriptor_t k_desc,       /* new keys */
    infiniopTensorDescriptor_t v_desc,       /* new values */
    infiniopTensorDescriptor_t k_cache_desc, // where they go, and
    infiniopTensorDescriptor_t v_cache_desc,
    infiniopTensorDescriptor_t slot_mapping_desc);
__C __export infiniStatus_t infiniopGetPagedCachingWorkspaceSize(infiniopPagedCachingDescriptor_t desc, size_t *size);
__C __export infiniStatus_t infiniopPagedCaching(
    infiniopPagedCachingDescriptor_t desc, void *workspace, size_t workspace_size,
    const void *k, const void *v, void *k_cache, void *v_cache, const void *slot_mapping, void *stream);
__C __export infiniStatus_t infiniopDestroyPagedCachingDescriptor(infiniopPagedCachingDescriptor_t desc);
