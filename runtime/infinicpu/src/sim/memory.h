#ifndef INFINICPU_SIM_MEMORY_H_
#define INFINICPU_SIM_MEMORY_H_

#include "../rt/device.h"

#include <cstddef>

// The memory of simulated devices: which addresses belong to which device, and which were freed lately.

namespace infinirt_cpu {

// What fresh, freed and destroyed memory is filled with: NaN in every floating dtype, -1 in every signed integer.
constexpr int POISON = 0xff;

enum class Kind { DEVICE,
                  HOST }; // infinirtMalloc, infinirtMallocHost

// Fresh memory, poisoned. nullptr when memory is out.
void *allocateSimulated(Device device, Kind kind, size_t size);

// Frees what allocateSimulated gave. `known` is false, and nothing was done, when the address is none of a simulated
// device's: it may be the plain CPU's. Freed memory is poisoned and kept out of use for a while.
infiniStatus_t freeSimulated(Device current, Kind kind, void *ptr, bool *known);

// BAD_PARAM with a report unless the bytes lie in one live allocation of the device.
infiniStatus_t checkDeviceMemory(Device device, const void *ptr, size_t bytes, const char *what);

// BAD_PARAM with a report if any of the bytes is a simulated device's memory, or freed memory.
infiniStatus_t checkHostMemory(Device current, const void *ptr, size_t bytes, const char *what);

// Whether anything of this type of device is allocated.
bool hasSimulatedMemory(infiniDevice_t type);

// Lets go of freed memory.
void dropFreedMemory();

} // namespace infinirt_cpu

#endif // INFINICPU_SIM_MEMORY_H_
