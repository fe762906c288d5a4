// What the two kernels of the selective scan have in common: layout of a block, tiles in shared memory, arithmetic.
//
// A block has CHANNELS = 16 GROUPS neighbouring channels of one head and walks the sequence in tiles of TILE steps.
// A warp has 16 channels and a half of their 16 states. Lane (g, c) = (lane / 4, lane % 4) holds four of these states, in
// the layout of a result of the tensor cores' 16 x 8 products, so that these can sum over states and over channels
// without shuffles:
//
//     value[2 i + j]:  channel g + 8 i, state 8 half + 2 c + j
//
// What is done once a channel and step (softplus, gates, loads and stores) is done in another layout, "flat": a thread has
// step `row` of 8, and two neighbouring channels. The two meet in shared memory.

#ifndef EMULATED  // tests/model/emulated_cuda.h has these for a CPU
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats to bfloat16, rounded to nearest even; `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// A B: A 16 x 8 (a0: row g, column c; a1: row g + 8; a2, a3: column c + 4), B 8 x 8 (b0: row c, column g; b1: row c + 4),
// the result 16 x 8 (d[0], d[1]: row g, columns 2c, 2c + 1; d[2], d[3]: row g + 8). Operands are cut to 10 bits of
// mantissa, sums are float32.
__device__ __forceinline__ void product(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(0.0f));
}

// d += A B
__device__ __forceinline__ void add_product(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#define SHARED(name) extern __shared__ float4 name[]
#endif

constexpr int STATES = 16;
constexpr int GROUPS = WARPS / 2;       // of 16 channels
constexpr int CHANNELS = 16 * GROUPS;
constexpr int COLUMNS = CHANNELS / 2;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = THREADS / COLUMNS;  // steps of one pass of the flat layout: 8
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// Floats of shared memory for {dt, dt x} of the 16 channels of a group and step; the four that nothing uses keep threads
// off each other's banks.
constexpr int PAIR_ROW = 36;

__device__ __forceinline__ float low(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(u32 both) { return __uint_as_float(both & 0xffff0000u); }

// A (batch, time, channel) tensor of bfloat16 with unit stride along the channels.
struct Rows {
  char* data;
  i64 batch;  // strides in bytes
  int row;
};

// Two neighbouring values of a Rows.
struct Two {
  u32 word;
  __device__ __forceinline__ float operator[](int e) const { return e ? high(word) : low(word); }
};

__device__ __forceinline__ Two load(const char* base, int step, int row, bool there) {
  return {there ? *reinterpret_cast<const u32*>(base + static_cast<i64>(step) * row) : 0};
}

__device__ __forceinline__ void store(char* base, int step, int row, float first, float second) {
  *reinterpret_cast<u32*>(base + static_cast<i64>(step) * row) = pack(first, second);
}

// log(1 + exp(v)), to float32 rounding for small results too, and its slope.
struct Softplus {
  float value, slope;
  __device__ __forceinline__ explicit Softplus(float v) {
    const float u = ex2(fminf(v, 20.0f) * LOG2E), exact = lg2(1.0f + u) * LN2;
    const float series = u * (1.0f - u * (0.5f - u * (0.33333334f - u * 0.25f)));
    value = !(v <= 20.0f) ? v : u < 0.03f ? series : exact;  // NaN stays NaN
    slope = u * reciprocal(1.0f + u);
  }
};

__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.0f + ex2(-v * LOG2E)); }

// This block's and thread's place.
struct Place {
  int lane, warp, g, c;
  int group;  // of 16 channels, within the block
  int half;   // which 8 states
  int head, own;  // own: channels from the block's first to the head's last
  i64 batch, channel;  // channel: the block's first
  int row, column;  // flat: step of 8, first channel within the block
  bool live;        // flat: whether those channels are the head's

  __device__ __forceinline__ Place(int blocks, int head_channels) {
    const int thread = threadIdx.x;
    lane = thread % 32, warp = thread / 32, g = lane / 4, c = lane % 4;
    group = warp / 2, half = warp % 2;
    head = blockIdx.x / blocks;
    const int first = static_cast<int>(blockIdx.x % blocks) * CHANNELS;
    own = head_channels - first;
    batch = blockIdx.y, channel = static_cast<i64>(head) * head_channels + first;
    row = thread / COLUMNS, column = thread % COLUMNS * 2;
    live = column < own;
  }
};

// Where a channel of a block lies in a step's rows of `row` float2, in which channels g and g + 8 of a group are
// neighbours.
__device__ __forceinline__ int paired(int step, int channel, int row) {
  return (step * GROUPS + channel / 16) * row + channel % 8 * 2 + channel % 16 / 8;
}

// Where value `state` of a step lies in a tile of B or C: a lane's states are neighbours.
__device__ __forceinline__ int state_at(int step, int state) {
  return step * STATES + state % 8 / 2 * 4 + state / 8 * 2 + state % 2;
}

// Tiles of B and C on their way from global to shared memory: each thread has LOADS pairs of neighbouring states, all of B
// or all of C.
template <int TILE>
struct Selection {
  static constexpr int PAIRS = TILE * STATES / 2;  // of one of the two
  static constexpr int LOADS = (2 * PAIRS + THREADS - 1) / THREADS;
  const char* base;
  int row, time, step;
  float* to;
  bool any;
  u32 word[LOADS];

  __device__ __forceinline__ Selection(const Rows& B, i64 B_head, const Rows& C, i64 C_head, float* B_tile, float* C_tile,
                                       const Place& at, int steps) {
    constexpr int EACH = THREADS / 2;  // the first half of the threads has B
    const int which = threadIdx.x / EACH, pair = threadIdx.x % EACH;
    const Rows& from = which ? C : B;
    base = from.data + at.batch * from.batch + at.head * (which ? C_head : B_head) + pair % 8 * 4;
    row = from.row, time = steps, step = pair / 8, any = pair < PAIRS;
    to = (which ? C_tile : B_tile) + state_at(step, pair % 8 * 2);
  }

  __device__ __forceinline__ void fetch(int start) {
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      const int at = start + step + k * (THREADS / 16);
      word[k] = load(base, at, row, any && at >= 0 && at < time).word;
    }
  }

  __device__ __forceinline__ void put() const {
#pragma unroll
    for (int k = 0; k < LOADS; k++)
      if (any) *reinterpret_cast<float2*>(to + k * (THREADS / 16) * STATES) = make_float2(low(word[k]), high(word[k]));
  }
};

// States are kept before every KEPT_EVERY steps: (batch, kept tiles, heads x groups of a head, 2 halves, 32 lanes, 4).
__device__ __forceinline__ i64 kept_at(const Place& at, int tiles, int tile, int groups_of_head, int heads, int block) {
  const i64 group = static_cast<i64>(at.head) * groups_of_head + block * GROUPS + at.group;
  return (((at.batch * tiles + tile) * heads * groups_of_head + group) * 2 + at.half) * 32 + at.lane;  // in uint2
}
