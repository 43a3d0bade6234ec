// infinirt's graphs: what a simulated stream's capture recorded. Devices without graphs, the CPU among them, refuse all of
// it with the status that InfiniCore gives.

#include "../sim/queue.h"
#include "../sim/record.h"
#include "device.h"
#include "stream.h"

#include <map>

using namespace infinirt_cpu;

namespace {

// A captured sequence. A graph and what is instantiated from it share the nodes.
struct Graph {
    Device device;
    std::shared_ptr<const std::vector<SharedWork>> nodes;
};

// All graphs and executables that are alive, by their handles.
struct Graphs {
    std::mutex mutex;
    std::map<const void *, std::unique_ptr<Graph>> alive;
};

// Never destroyed: threads may still run at exit.
Graphs &graphs() {
    static Graphs &instance = *new Graphs;
    return instance;
}

bool canCapture(Device current) {
    const Record *record = isDeferred(current.type) ? recordOf(current.type) : nullptr;
    return record != nullptr && record->graph_capture;
}

infiniStatus_t refuse(Device device, const std::string &text) {
    return violation(device.type, INFINI_STATUS_BAD_PARAM, text);
}

void *add(const Graph &graph) {
    auto made = std::make_unique<Graph>(graph);
    void *const handle = made.get();
    Graphs &all = graphs();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.alive.emplace(handle, std::move(made));
    return handle;
}

// The graph behind a handle that the current device is given.
infiniStatus_t find(const void *handle, Device current, const char *what, Graph *graph) {
    Graphs &all = graphs();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto it = all.alive.find(handle);
    if (it == all.alive.end()) {
        return refuse(current, std::string(what) + ": no such graph");
    }
    if (it->second->device != current) {
        return refuse(current, std::string(what) + ": the graph is another device's");
    }
    *graph = *it->second;
    return INFINI_STATUS_SUCCESS;
}

infiniStatus_t destroy(const void *handle, const char *what) {
    Graphs &all = graphs();
    std::unique_ptr<Graph> graph; // destroyed without the lock
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto it = all.alive.find(handle);
    if (it != all.alive.end()) {
        graph = std::move(it->second);
        all.alive.erase(it);
        return INFINI_STATUS_SUCCESS;
    }
    const Device current = currentDevice();
    if (!canCapture(current)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    return handle == nullptr ? INFINI_STATUS_SUCCESS : refuse(current, std::string(what) + ": no such graph");
}

} // namespace

infiniStatus_t infinirtStreamBeginCapture(infinirtStream_t stream, infinirtStreamCaptureMode_t mode) {
    const Device current = currentDevice();
    if (!canCapture(current)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    if (stream == nullptr) {
        return refuse(current, "capture: the default stream cannot capture");
    }
    SharedQueue queue;
    const infiniStatus_t status = findQueue(stream, "capture", &queue);
    return status == INFINI_STATUS_SUCCESS ? queue->beginCapture(mode) : status;
}

infiniStatus_t infinirtStreamEndCapture(infinirtStream_t stream, infinirtGraph_t *graph_ptr) {
    const Device current = currentDevice();
    if (!canCapture(current)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    if (graph_ptr == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    *graph_ptr = nullptr;
    SharedQueue queue;
    std::vector<SharedWork> nodes;
    infiniStatus_t status = findQueue(stream, "capture", &queue);
    if (status == INFINI_STATUS_SUCCESS) {
        status = queue->endCapture(&nodes);
    }
    if (status == INFINI_STATUS_SUCCESS) {
        *graph_ptr = add({current, std::make_shared<const std::vector<SharedWork>>(std::move(nodes))});
    }
    return status;
}

infiniStatus_t infinirtGraphDestroy(infinirtGraph_t graph) {
    return destroy(graph, "infinirtGraphDestroy");
}

infiniStatus_t infinirtGraphInstantiate(infinirtGraphExec_t *graph_exec_ptr, infinirtGraph_t graph, infinirtGraphNode_t *node_ptr, char *, size_t) {
    const Device current = currentDevice();
    if (!canCapture(current)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    if (graph_exec_ptr == nullptr || graph == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    if (node_ptr != nullptr) {
        *node_ptr = nullptr; // no node failed
    }
    Graph found;
    const infiniStatus_t status = find(graph, current, "infinirtGraphInstantiate", &found);
    *graph_exec_ptr = status == INFINI_STATUS_SUCCESS ? add(found) : nullptr;
    return status;
}

infiniStatus_t infinirtGraphExecDestroy(infinirtGraphExec_t graph_exec) {
    return destroy(graph_exec, "infinirtGraphExecDestroy");
}

infiniStatus_t infinirtGraphLuanch(infinirtGraphExec_t graph_exec, infinirtStream_t stream) {
    const Device current = currentDevice();
    if (!canCapture(current)) {
        return INFINI_STATUS_DEVICE_TYPE_NOT_SUPPORTED;
    }
    if (graph_exec == nullptr) {
        return INFINI_STATUS_NULL_POINTER;
    }
    Graph graph;
    SharedQueue queue;
    infiniStatus_t status = find(graph_exec, current, "infinirtGraphLuanch", &graph);
    if (status == INFINI_STATUS_SUCCESS) {
        status = findQueue(stream, "infinirtGraphLuanch", &queue);
    }
    return status == INFINI_STATUS_SUCCESS ? queue->pushAll(*graph.nodes) : status;
}
