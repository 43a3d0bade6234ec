#ifndef INFINICPU_RT_DEVICE_H_
#define INFINICPU_RT_DEVICE_H_

#include <infinicore.h>

#include <cstddef>

namespace infinirt_cpu {

struct Device {
    infiniDevice_t type = INFINI_DEVICE_CPU;
    int id = 0;

    bool operator==(const Device &other) const { return type == other.type && id == other.id; }
    bool operator!=(const Device &other) const { return !(*this == other); }
    bool operator<(const Device &other) const { return type != other.type ? type < other.type : id < other.id; }
};

// The calling thread's.
Device currentDevice();
void setCurrentDevice(Device device);

// Makes another device the current one for a while.
class CurrentDevice {
public:
    explicit CurrentDevice(Device device) : _before(currentDevice()) { setCurrentDevice(device); }
    ~CurrentDevice() { setCurrentDevice(_before); }
    CurrentDevice(const CurrentDevice &) = delete;
    CurrentDevice &operator=(const CurrentDevice &) = delete;

private:
    Device _before;
};

// The host's memory, as infinirtMalloc gives it on the plain CPU. size is not 0; nullptr when memory is out.
void *allocateHost(size_t size);

} // namespace infinirt_cpu

#endif // INFINICPU_RT_DEVICE_H_
