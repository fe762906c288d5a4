// Runs a CUDA kernel on a CPU, to test its arithmetic and its indexing: each thread of a block is a fiber, and one
// after the other goes on to its next barrier or warp-wide operation. Every thread must meet the same ones.
#pragma once
#define EMULATED 1

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef unsigned int u32;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

namespace emulated {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
struct Operands { float a[4], b[2]; };
// An asynchronous copy on its way: it is there when its thread waits for its group, and not before.
struct Copy { void* to; const void* from; size_t size; int group; };

inline Dim3 thread, block, grid;
inline char* memory;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline std::vector<Operands> operands[2];
inline std::vector<int> turn, groups;
inline std::vector<std::vector<Copy>> copies;

inline void yield() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
  current = me;
  thread.x = me;
}

inline float cut(float x) {  // to the 10 bits of mantissa that the tensor cores keep
  u32 bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffffe000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename Function>
inline void entry(Function* body) { (*body)(); }

template <typename Body>
void run(Body body, int grid_x, int grid_y, int threads, size_t shared_bytes) {
  std::vector<char> shared(shared_bytes + 64);
  memory = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 63) / 64 * 64);
  grid = {unsigned(grid_x), unsigned(grid_y), 1};
  for (int y = 0; y < grid_y; y++)
    for (int x = 0; x < grid_x; x++) {
      block = {unsigned(x), unsigned(y), 0};
      std::memset(memory, 0x7f, shared_bytes);  // what is read before it is written shows: 3.4e38
      fibers.assign(threads, Fiber());
      for (auto& side : operands) side.assign(threads, Operands());
      turn.assign(threads, 0), groups.assign(threads, 0), copies.assign(threads, {});
      static Body* now;
      now = &body;
      for (int t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.stack.resize(1 << 17);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(+[] {
                      (*now)();
                      fibers[current].done = true;
                    }), 0);
      }
      for (bool going = true; going;) {
        going = false;
        for (int k = 0; k < threads; k++) {
          const int t = BACKWARDS ? threads - 1 - k : k;
          if (!fibers[t].done) {
            current = t;
            thread.x = t;
            swapcontext(&scheduler, &fibers[t].context);
            going = true;
          }
        }
      }
    }
}
}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid
#define SHARED(name) float4* const name = reinterpret_cast<float4*>(emulated::memory)

inline void __syncthreads() { emulated::yield(); }
inline float __uint_as_float(u32 bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline u32 __float_as_uint(float x) { u32 bits; std::memcpy(&bits, &x, 4); return bits; }
template <typename Word>
inline void copy(Word* to, const void* from, bool there) {
  using namespace emulated;
  copies[current].push_back({to, there ? from : nullptr, sizeof(Word), groups[current]});
  std::memset(to, 0x7f, sizeof(Word));
}
inline void asked() { emulated::groups[emulated::current]++; }
template <int LATER>
inline void copied() {
  using namespace emulated;
  auto& mine = copies[current];
  size_t done = 0;
  for (; done < mine.size() && mine[done].group < groups[current] - LATER; done++)
    if (mine[done].from)
      std::memcpy(mine[done].to, mine[done].from, mine[done].size);
    else
      std::memset(mine[done].to, 0, mine[done].size);
  mine.erase(mine.begin(), mine.begin() + done);
}
inline float ex2(float x) { return std::exp2f(x); }
inline float lg2(float x) { return std::log2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline u32 rounded(float x) {
  const u32 bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return rounded(low) | rounded(high) << 16; }

// d += A B
inline void add_product(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  using namespace emulated;
  const int me = current, warp = me / 32 * 32, g = me % 32 / 4, c = me % 4;
  auto& side = operands[turn[me]++ % 2];
  side[me] = {{cut(a0), cut(a1), cut(a2), cut(a3)}, {cut(b0), cut(b1)}};
  yield();
  for (int row = 0; row < 2; row++)
    for (int column = 0; column < 2; column++)
      for (int k = 0; k < 8; k++) {
        const Operands& left = side[warp + 4 * g + k % 4];
        const Operands& right = side[warp + 4 * (2 * c + column) + k % 4];
        d[2 * row + column] += left.a[row + k / 4 * 2] * right.b[k / 4];
      }
}
inline void product(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  add_product(d, a0, a1, a2, a3, b0, b1);
}
