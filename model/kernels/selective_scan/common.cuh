// What the two kernels of the selective scan have in common: layout of a block, tiles in shared memory, arithmetic.
//
// A block has CHANNELS = 16 GROUPS neighbouring channels of one head and walks the sequence in tiles of TILE steps.
// A warp has 16 channels and a half of their 16 states. Lane (g, c) = (lane / 4, lane % 4) holds four of these states, in
// the layout of a result of the tensor cores' 16 x 8 products, so that these can sum over states without shuffles:
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

// Asks for a word in global memory, or zeros, to be written to shared memory. `asked` ends a group; a thread finds its own
// words after `copied`, which waits for all but the last LATER groups.
template <typename Word>
__device__ __forceinline__ void copy(Word* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(to))),
               "l"(from), "n"(sizeof(Word)), "r"(there ? static_cast<int>(sizeof(Word)) : 0)
               : "memory");
}
__device__ __forceinline__ void asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>
__device__ __forceinline__ void copied() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
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

// One input on its way to shared memory: a thread has its words there, one every STEPS steps of a tile, and asks for them
// a tile or two ahead. Loads to registers would share the few scoreboards of a warp with all that is near, which the
// compiler then lets wait for what is far.
template <int WORDS, int STEPS>
struct Stream {
  const char* from;
  int row, step, at;  // at: of its words among the thread's

  // start: the first tile's first step; step: this thread's first one in a tile
  __device__ __forceinline__ Stream(const char* data, int row, int start, int step, int at)
      : from(data + static_cast<i64>(start + step) * row), row(row), step(step), at(at * THREADS) {}

  // For the next tile to be asked for, on or back (by: 1, -1). steps: of the tile, which are within the sequence
  __device__ __forceinline__ void ask(u32* words, bool there, int steps, int by) {
#pragma unroll
    for (int k = 0; k < WORDS; k++)
      copy(words + at + k * THREADS, from + static_cast<i64>(k * STEPS) * row, there && step + k * STEPS < steps);
    from += static_cast<i64>(by * WORDS * STEPS) * row;
  }

  __device__ __forceinline__ Two get(const u32* words, int k) const { return {words[at + k * THREADS]}; }
};

// Packed also where it is not stored: branches keep the compiler from mixing what is around them.
__device__ __forceinline__ void store(char* to, float first, float second, bool there) {
  const u32 word = pack(first, second);
  if (there) *reinterpret_cast<u32*>(to) = word;
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

// silu(v) = v sigmoid(v), but not 0 where v is: what is smaller than 1e-30 counts as that. So the backward pass can tell y
// from what the forward pass made of it: the gradient of v is that of the product, times the product, times silu' / silu.
struct Gate {
  float v, open, value;
  __device__ __forceinline__ explicit Gate(float given) {
    v = fabsf(given) < 1e-30f ? 1e-30f : given;
    open = reciprocal(1.0f + ex2(-v * LOG2E));
    value = v * open;
  }
  // silu'(v) / silu(v)
  __device__ __forceinline__ float relative_slope() const { return reciprocal(v) + (1.0f - open); }
};

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

// Where a step's B (which: 0) or C (1) of two states from `state` on lies in their tile, in floats: a lane has its two
// of both as neighbours.
constexpr int SELECTED = 2 * STATES;  // floats of a step
__device__ __forceinline__ int selected_at(int step, int state, int which) {
  return step * SELECTED + state % 8 / 2 * 8 + state / 8 * 4 + which * 2;
}

// B and C of a tile: each thread has WORDS pairs of neighbouring states, all of B or all of C.
template <int TILE>
struct Selection {
  static constexpr int STEPS = THREADS / 16, WORDS = TILE / STEPS;
  static_assert(WORDS * STEPS == TILE, "no thread is idle");
  Stream<WORDS, STEPS> stream;
  int to;

  __device__ __forceinline__ Selection(const Rows& B, i64 B_head, const Rows& C, i64 C_head, const Place& place, int start,
                                       int at)
      : stream(data(B, B_head, C, C_head, place), is_C() ? C.row : B.row, start, pair() / 8, at),
        to(selected_at(pair() / 8, pair() % 8 * 2, is_C())) {}

  __device__ __forceinline__ void put(const u32* words, float* tile) const {
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
      const Two two = stream.get(words, k);
      *reinterpret_cast<float2*>(tile + to + k * STEPS * SELECTED) = make_float2(two[0], two[1]);
    }
  }

 private:
  // The first half of the threads has B.
  static __device__ __forceinline__ int is_C() { return threadIdx.x / (THREADS / 2); }
  static __device__ __forceinline__ int pair() { return threadIdx.x % (THREADS / 2); }
  static __device__ __forceinline__ const char* data(const Rows& B, i64 B_head, const Rows& C, i64 C_head,
                                                     const Place& place) {
    const Rows& rows = is_C() ? C : B;
    return rows.data + place.batch * rows.batch + place.head * (is_C() ? C_head : B_head) + pair() % 8 * 4;
  }
};

// Where documents begin; the first TILE threads have a step each.
template <int TILE>
struct Borders {
  const int* document;  // of this thread's step in the next tile to be asked for
  int step, at;         // words: its document and the one before

  __device__ __forceinline__ Borders(const int* documents, const Place& place, int time, int start, int at)
      : document(documents + place.batch * time + start + threadIdx.x), step(start + threadIdx.x), at(at * THREADS) {}

  __device__ __forceinline__ void ask(u32* words, bool there, int steps, int by) {
    const bool mine = there && static_cast<int>(threadIdx.x) < (steps < TILE ? steps : TILE);
    copy(words + at, document, mine);
    copy(words + at + THREADS, document - 1, mine && step > 0);
    document += by * TILE, step += by * TILE;
  }

  // start: the tile's first step
  __device__ __forceinline__ void put(const u32* words, int start, float* same) const {
    if (threadIdx.x < TILE)
      same[threadIdx.x] =
          start + static_cast<int>(threadIdx.x) == 0 || words[at] == words[at + THREADS] ? 1.0f : 0.0f;
  }
};

// States are kept before every KEPT_EVERY steps: (batch, kept tiles, heads x groups of a head, 2 halves, 32 lanes, 4).
__device__ __forceinline__ i64 kept_at(const Place& at, int tiles, int tile, int groups_of_head, int heads, int block) {
  const i64 group = static_cast<i64>(at.head) * groups_of_head + block * GROUPS + at.group;
  return (((at.batch * tiles + tile) * heads * groups_of_head + group) * 2 + at.half) * 32 + at.lane;  // in uint2
}
