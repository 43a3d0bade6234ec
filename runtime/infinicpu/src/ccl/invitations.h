#ifndef INFINICPU_CCL_INVITATIONS_H_
#define INFINICPU_CCL_INVITATIONS_H_

#include "rendezvous.h"

#include <infiniccl.h>

#include <array>

// Unique ids: each is good for one communicator, whose ranks come one by one.

namespace infiniccl_cpu {

using Id = std::array<char, INFINICCL_UNIQUE_ID_BYTES>;

// Hands out a new id. Throws when there is no memory or no randomness.
Id invite();

// The rank takes its place in the id's group. BAD_PARAM for an id that was not handed out here or is used up, and for a
// rank that does not fit those that came before (number of ranks, kind of device, same rank or device): then nobody can
// come any more, and those that wait fail.
infiniStatus_t accept(const Id &id, int nranks, int rank, infiniDevice_t device_type, int device_id, std::shared_ptr<Group> *group);

// Nobody can come any more.
void withdraw(const Id &id);

} // namespace infiniccl_cpu

#endif // INFINICPU_CCL_INVITATIONS_H_
