// A warp of 32 threads of the host, for device functions that are C++ but for what lanes tell one another.
#include <barrier>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Lane {
  int x;
};

constexpr int kLanes = 32;
static thread_local Lane threadIdx;
static unsigned slots[kLanes];
static std::barrier<> meet(kLanes);

inline unsigned __popc(unsigned word) { return __builtin_popcount(word); }

inline unsigned __shfl_sync(unsigned, unsigned value, int source) {
  slots[threadIdx.x] = value;
  meet.arrive_and_wait();
  const unsigned found = slots[source];
  meet.arrive_and_wait();
  return found;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  slots[threadIdx.x] = predicate;
  meet.arrive_and_wait();
  unsigned word = 0;
  for (int lane = 0; lane < kLanes; ++lane) word |= slots[lane] << lane;
  meet.arrive_and_wait();
  return word;
}

template <typename Body>
void warp(Body body) {
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes.emplace_back([lane, body] {
      threadIdx.x = lane;
      body(lane);
    });
  }
  for (auto& lane : lanes) lane.join();
}
