#include "invitations.h"

#include <cstdio>
#include <random>
#include <unistd.h>

namespace infiniccl_cpu {

namespace {

// An id that was handed out, until all ranks have come.
struct Invitation {
    std::shared_ptr<Group> group; // made by the first to come
    infiniDevice_t device_type = INFINI_DEVICE_CPU;
    std::map<int, int> devices; // device id by rank
};

struct Invitations {
    std::mutex mutex;
    std::map<Id, Invitation> open;
    uint64_t handed_out = 0;
};

Invitations &invitations() {
    static Invitations instance;
    return instance;
}

} // namespace

Id invite() {
    std::random_device random;
    Invitations &all = invitations();
    const std::lock_guard<std::mutex> lock(all.mutex);
    Id id{};
    // The process and some random bits: an id of another process is not found here.
    std::snprintf(id.data(), id.size(), "infinicpu %ld %llu %08x%08x", long(getpid()), static_cast<unsigned long long>(++all.handed_out), random(), random());
    all.open[id];
    return id;
}

infiniStatus_t accept(const Id &id, int nranks, int rank, infiniDevice_t device_type, int device_id, std::shared_ptr<Group> *group) {
    Invitations &all = invitations();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.open.find(id);
    if (found == all.open.end()) {
        return INFINI_STATUS_BAD_PARAM;
    }
    Invitation &invitation = found->second;
    if (invitation.group == nullptr) {
        invitation.group = std::make_shared<Group>(nranks);
        invitation.device_type = device_type;
    }
    bool fits = invitation.group->size() == nranks && invitation.device_type == device_type;
    for (const auto &[other_rank, other_device] : invitation.devices) {
        fits = fits && other_rank != rank && other_device != device_id;
    }
    if (!fits) {
        invitation.group->fail(INFINI_STATUS_BAD_PARAM);
        all.open.erase(found);
        return INFINI_STATUS_BAD_PARAM;
    }
    invitation.devices[rank] = device_id;
    *group = invitation.group;
    if (invitation.devices.size() == size_t(nranks)) {
        all.open.erase(found);
    }
    return INFINI_STATUS_SUCCESS;
}

void withdraw(const Id &id) {
    Invitations &all = invitations();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.open.erase(id);
}

} // namespace infiniccl_cpu
