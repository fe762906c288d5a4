// Selective scan, backward: gradients of everything, one walk from the last tile to the first. See cuda_scan.py.
#include "common.cuh"

struct Backward {
  Rows x, dt, z, B, C, y, dy;  // B, C: (batch, time, head, state), heads B_head and C_head apart; y: of the forward pass
  i64 B_head, C_head;
  const float* A;       // (channels, 16), negative
  const float* D;       // (channels,)
  const float* bias;    // (channels,)
  const int* document;  // (batch, time); only where DOCUMENTS
  const uint2* kept;
  Rows dx, ddt, dz;
  float* shares;  // of dB and dC: (2, batch, head, block, time in whole tiles, 16)
  float* dA;      // (batch, channels, 16)
  float* dD;      // (batch, channels)
  float* dbias;   // (batch, channels)
  int time, heads, head_channels, blocks;  // blocks: of a head
};

constexpr int TILE = KEPT_EVERY;
constexpr int PART = 8 * 16 + 16;  // floats for a warp's parts of dB and dC in a step: (g, c, {dB, dC}, 2 states)
constexpr int STREAMED = 8;        // words of a thread and tile: five inputs, B or C, two documents
constexpr int COLUMN_STEPS = 4;    // steps whose sums over states fill the columns of one product
// Floats for the gradient of y before its gate, of a group and step; for those of dt x and of the exponent, of a step and
// half, {the two} as `paired` with rows of D_PAIR. The rest keeps what is stored at once on different banks.
constexpr int DY_ROW = 18, D_PAIR = 18, D_ROW = 84;
// In floats: a tile's pairs, B and C, dy, and 0 where a document begins. There are two.
constexpr int SELECTED_AT = TILE * GROUPS * PAIR_ROW, DY_AT = SELECTED_AT + TILE * SELECTED;
constexpr int SAME_AT = DY_AT + TILE * GROUPS * DY_ROW, BUFFER = SAME_AT + TILE;
static_assert(SHARED_FLOATS == 2 * BUFFER + TILE * (WARPS * PART + 2 * D_ROW) + 2 * (STREAMED + 2) * THREADS,
              "cuda_scan.py knows how much shared memory this takes");
static_assert(TILE == ROWS && TILE * STATES == THREADS && GROUPS == 2, "a thread has a step, a sum of dB or dC");

// A tile's states, and what is read twice.
struct States {
  float h[TILE + 1][4], decay[TILE][4];
  float4 pair[TILE];
};

// What a thread knows of its step of a tile in the flat layout. gated: the gradient of y before its gate.
struct Flat {
  Two x;
  float dt[2], slope[2], gated[2];
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) scan_backward(const Backward in) {
  SHARED(memory);
  float* const buffers = reinterpret_cast<float*>(memory);
  float* const parts = buffers + 2 * BUFFER;         // (step, warp, PART)
  float* const d_sum = parts + TILE * WARPS * PART;  // (step, half, D_ROW)
  // Of this thread, for two tiles each: words on their way, and the states before the tile.
  u32* const words = reinterpret_cast<u32*>(d_sum + 2 * TILE * D_ROW) + threadIdx.x;
  uint2* const my_states = reinterpret_cast<uint2*>(words + 2 * STREAMED * THREADS - threadIdx.x) + threadIdx.x;

  const Place at(in.blocks, in.head_channels);
  const int block = blockIdx.x % in.blocks, groups_of_head = (in.head_channels + 15) / 16;
  const int tiles = (in.time + TILE - 1) / TILE, last = (tiles - 1) * TILE;
  const bool kept = block * GROUPS + at.group < groups_of_head;
  const i64 batch = at.batch, first = at.channel + at.column;
  // What is read and written moves from tile to tile.
  const auto data = [&](const Rows& rows) { return rows.data + batch * rows.batch + first * 2; };
  const auto stream = [&](const Rows& rows, int which) {
    return Stream<1, TILE>(data(rows), rows.row, last, at.row, which);
  };
  const auto begin = [&](const Rows& rows) { return data(rows) + static_cast<i64>(last + at.row) * rows.row; };
  auto x = stream(in.x, 0), dt = stream(in.dt, 1), z = stream(in.z, 2), y = stream(in.y, 3), dy = stream(in.dy, 4);
  Selection<TILE> selection(in.B, in.B_head, in.C, in.C_head, at, last, 5);
#if DOCUMENTS
  Borders<TILE> borders(in.document, at, in.time, last, 6);
#endif
  char *dx = begin(in.dx), *ddt = begin(in.ddt), *dz = begin(in.dz);
  const uint2* states = in.kept + kept_at(at, tiles, tiles - 1, groups_of_head, in.heads, block);
  const i64 states_tile = static_cast<i64>(in.heads) * groups_of_head * 64;

  float A[4], dA[4], carried[4];  // carried: the gradient of h from later steps, times the decay
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int channel = at.group * 16 + at.g + k / 2 * 8, state = at.half * 8 + at.c * 2 + k % 2;
    A[k] = channel < at.own ? in.A[(at.channel + channel) * STATES + state] * LOG2E : 0.0f;
    dA[k] = carried[k] = 0.0f;
  }
  float D[2], bias[2], dD[2] = {0.0f, 0.0f}, dbias[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    D[e] = at.live ? in.D[first + e] : 0.0f;
    bias[e] = at.live ? in.bias[first + e] : 0.0f;
  }
  // Where this lane reads and writes in a step.
  const float4* const my_pair = reinterpret_cast<const float4*>(buffers) + at.group * (PAIR_ROW / 4) + at.g;
  const float2* const my_dy = reinterpret_cast<const float2*>(buffers + DY_AT) + at.group * (DY_ROW / 2) + at.g;
  const float4* const my_BC = reinterpret_cast<const float4*>(buffers + SELECTED_AT) + at.c * 2 + at.half;
  float4* const my_d =
      reinterpret_cast<float4*>(d_sum) + (2 * at.c + at.half) * (D_ROW / 4) + at.group * (D_PAIR / 2) + at.g;
  float4* const my_part = reinterpret_cast<float4*>(parts + at.warp * PART) + at.lane;
  // Ones in column 2 k for the first rows of a product, in 2 k + 1 for the second.
  float even[COLUMN_STEPS], odd[COLUMN_STEPS];
#pragma unroll
  for (int k = 0; k < COLUMN_STEPS; k++) {
    even[k] = at.g == 2 * k ? 1.0f : 0.0f;
    odd[k] = at.g == 2 * k + 1 ? 1.0f : 0.0f;
  }

  // What of the parts this thread sums, and for where: of one step, two states and dB or dC.
  const int sum_step = threadIdx.x / 16, sum_half = threadIdx.x / 8 % 2, sum_lane = threadIdx.x % 8, plane = sum_lane % 2;
  const float2* const my_parts =
      reinterpret_cast<const float2*>(parts + (sum_step * WARPS + sum_half) * PART) + sum_lane;
  float2* share;
  {
    const i64 blocks = static_cast<i64>(in.heads) * in.blocks, batches = gridDim.y;
    const i64 row = ((plane * batches + batch) * blocks + blockIdx.x) * tiles * TILE + last + sum_step;
    share = reinterpret_cast<float2*>(in.shares + row * STATES + sum_half * 8) + sum_lane / 2;
  }

  auto ask = [&](int buffer, bool there, int steps) {  // steps: of the tile, which are within the sequence
    const bool live = there && at.live;
    u32* const to = words + buffer * STREAMED * THREADS;
    x.ask(to, live, steps, -1), dt.ask(to, live, steps, -1), z.ask(to, live, steps, -1);
    y.ask(to, live, steps, -1), dy.ask(to, live, steps, -1);
    selection.stream.ask(to, there, steps, -1);
    copy(my_states + buffer * THREADS, states, there && kept), states -= states_tile;
#if DOCUMENTS
    borders.ask(to, there, steps, -1);
#endif
    asked();
  };
  // In steps after the sequence's last x and dy are zero, and so is all that they add to.
  auto put = [&](int start, int buffer, Flat& flat, States& tile) {
    const u32* const from = words + buffer * STREAMED * THREADS;
    const Two raw = dt.get(from, 0), now_z = z.get(from, 0), now_y = y.get(from, 0), now_dy = dy.get(from, 0);
    float out_z[2];
    flat.x = x.get(from, 0);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const Softplus positive(raw[e] + bias[e]);
      const Gate gate(now_z[e]);
      flat.dt[e] = positive.value, flat.slope[e] = positive.slope;
      flat.gated[e] = now_dy[e] * gate.value;
      out_z[e] = now_dy[e] * (now_y[e] * gate.relative_slope());  // in this order, or it is lost where z is about 0
      dD[e] = fmaf(flat.gated[e], flat.x[e], dD[e]);
      reinterpret_cast<float2*>(buffers + buffer * BUFFER)[paired(at.row, at.column + e, PAIR_ROW / 2)] =
          make_float2(flat.dt[e], flat.dt[e] * flat.x[e]);
      buffers[buffer * BUFFER + DY_AT + paired(at.row, at.column + e, DY_ROW)] = flat.gated[e];
    }
    const int step = start + at.row;
    store(dz, out_z[0], out_z[1], at.live && step >= 0 && step < in.time);
    dz -= TILE * in.dz.row;
    selection.put(from, buffers + buffer * BUFFER + SELECTED_AT);
#if DOCUMENTS
    borders.put(from, start, buffers + buffer * BUFFER + SAME_AT);
#endif
    const uint2 kept_h = my_states[buffer * THREADS];
    tile.h[0][0] = low(kept_h.x), tile.h[0][1] = high(kept_h.x);
    tile.h[0][2] = low(kept_h.y), tile.h[0][3] = high(kept_h.y);
  };
  // A step of the states, from those before the tile.
  auto forward = [&](States& tile, int buffer, int step, const float4& pair, const float2& B_now) {
    tile.pair[step] = pair;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      tile.decay[step][k] = ex2((k < 2 ? pair.x : pair.z) * A[k]);
#if DOCUMENTS
      tile.decay[step][k] *= buffers[buffer * BUFFER + SAME_AT + step];
#endif
      tile.h[step + 1][k] =
          fmaf(tile.decay[step][k], tile.h[step][k], (k < 2 ? pair.y : pair.w) * (k % 2 ? B_now.y : B_now.x));
    }
  };
  auto pair_at = [&](int buffer, int step) { return my_pair[buffer * (BUFFER / 4) + step * GROUPS * (PAIR_ROW / 4)]; };
  auto B_at = [&](int buffer, int step) {
    return *reinterpret_cast<const float2*>(my_BC + buffer * (BUFFER / 4) + step * (SELECTED / 4));
  };
  // Backwards through one tile, and beside it the states of the next (the one before it in time) again: two chains that
  // do not wait for each other. What a step reads is asked for before the step before it stores: the compiler keeps that
  // order. The lane's two states are added up; their sums over c are products' (of dh B, the gradient of dt x, in even
  // columns, of the exponent's gradient in odd ones), stored when a product's columns are full.
  auto both = [&](const States& now, States& next, int buffer) {
    float sums[4];
    auto store_sums = [&](int step) {
      my_d[step * 2 * (D_ROW / 4)] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    };
    auto dy_at = [&](int step) { return my_dy[buffer * (BUFFER / 2) + step * GROUPS * (DY_ROW / 2)]; };
    auto BC_at = [&](int step) { return my_BC[buffer * (BUFFER / 4) + step * (SELECTED / 4)]; };
    float2 dy_now = dy_at(TILE - 1), B_next = B_at(1 - buffer, 0);
    float4 BC_now = BC_at(TILE - 1), pair_next = pair_at(1 - buffer, 0);
#pragma unroll
    for (int step = TILE - 1; step >= 0; step--) {
      const int after = step ? step - 1 : step;
      const float2 later_dy = dy_at(after), later_B = B_at(1 - buffer, TILE - 1 - after);
      const float4 later_BC = BC_at(after), later_pair = pair_at(1 - buffer, TILE - 1 - after);
      const float4 pair = now.pair[step];
      float dh[4], q[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        dh[k] = fmaf(k < 2 ? dy_now.x : dy_now.y, k % 2 ? BC_now.w : BC_now.z, carried[k]);
        carried[k] = dh[k] * now.decay[step][k];
        q[k] = carried[k] * now.h[step][k];
        dA[k] = fmaf(q[k], k < 2 ? pair.x : pair.z, dA[k]);
      }
      float du[2], exponent[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        du[i] = fmaf(dh[2 * i], BC_now.x, dh[2 * i + 1] * BC_now.y);
        exponent[i] = fmaf(q[2 * i], A[2 * i], q[2 * i + 1] * A[2 * i + 1]);
      }
      const float(&h)[4] = now.h[step + 1];
      my_part[step * WARPS * (PART / 4)] =
          make_float4(fmaf(dh[0], pair.y, dh[2] * pair.w), fmaf(dh[1], pair.y, dh[3] * pair.w),
                      fmaf(h[0], dy_now.x, h[2] * dy_now.y), fmaf(h[1], dy_now.x, h[3] * dy_now.y));
      constexpr int LAST = COLUMN_STEPS - 1;
      const int column = step % COLUMN_STEPS;
      if (column == LAST && step < TILE - 1) store_sums(step + 1);
      if (column == LAST)
        product(sums, du[0], du[1], exponent[0], exponent[1], even[column], odd[column]);
      else
        add_product(sums, du[0], du[1], exponent[0], exponent[1], even[column], odd[column]);
      forward(next, 1 - buffer, TILE - 1 - step, pair_next, B_next);
      dy_now = later_dy, B_next = later_B, BC_now = later_BC, pair_next = later_pair;
    }
    store_sums(0);
  };
  // What follows a tile.
  auto end = [&](int start, const Flat& flat) {
    float2 sum[4];  // of every fourth part, so that additions do not wait for each other
#pragma unroll
    for (int part = 0; part < GROUPS * 8; part++) {
      const float2 more = my_parts[part / 8 * PART + part % 8 * 8];
      float2& of = sum[part % 4];
      of = part < 4 ? more : make_float2(of.x + more.x, of.y + more.y);
    }
    *share = make_float2((sum[0].x + sum[1].x) + (sum[2].x + sum[3].x), (sum[0].y + sum[1].y) + (sum[2].y + sum[3].y));
    share -= TILE * (STATES / 2);
    float out_x[2], out_dt[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float2* const d_at =
          reinterpret_cast<const float2*>(d_sum) + at.row * D_ROW + paired(0, at.column + e, D_PAIR);
      const float du = d_at[0].x + d_at[D_ROW / 2].x, exponent = d_at[0].y + d_at[D_ROW / 2].y;
      out_x[e] = fmaf(du, flat.dt[e], D[e] * flat.gated[e]);
      out_dt[e] = fmaf(exponent, LN2, du * flat.x[e]) * flat.slope[e];
      dbias[e] += out_dt[e];
    }
    const bool there = at.live && start + at.row < in.time;
    store(dx, out_x[0], out_x[1], there);
    store(ddt, out_dt[0], out_dt[1], there);
    dx -= TILE * in.dx.row, ddt -= TILE * in.ddt.row;
  };

  // Tiles take turns with two buffers and sets of registers, each with every second one.
  States even_tile, odd_tile;
  Flat even_flat, odd_flat;
  ask(0, true, in.time - last);
  ask(1, last >= TILE, TILE);
  copied<1>();
  put(last, 0, even_flat, even_tile);
  ask(0, last >= 2 * TILE, TILE);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < TILE; step++) forward(even_tile, 0, step, pair_at(0, step), B_at(0, step));
  copied<1>();
  put(last - TILE, 1, odd_flat, odd_tile);
  ask(1, last >= 3 * TILE, TILE);

  auto turn = [&](int start, int buffer, States& now, States& next, Flat& flat) {
    __syncthreads();
    both(now, next, buffer);
    __syncthreads();
    // What follows the tile, and what the one before the next needs, together: each waits much.
    copied<1>();
    end(start, flat);
    put(start - 2 * TILE, buffer, flat, now);
    ask(buffer, start >= 4 * TILE, TILE);
  };
  for (int start = last; start >= 0; start -= 2 * TILE) {
    turn(start, 0, even_tile, odd_tile, even_flat);
    if (start < TILE) break;
    turn(start - TILE, 1, odd_tile, even_tile, odd_flat);
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int channel = at.group * 16 + at.g + 8 * i, state = at.half * 8 + at.c * 2;
    const i64 to = ((batch * in.heads * in.head_channels) + at.channel + channel) * STATES + state;
    if (channel < at.own) *reinterpret_cast<float2*>(in.dA + to) = make_float2(dA[2 * i], dA[2 * i + 1]);
  }
  // Sums over the rows of the flat layout.
  copied<0>();
  __syncthreads();
#pragma unroll
  for (int e = 0; e < 2; e++) {
    buffers[at.row * CHANNELS + at.column + e] = dD[e];
    buffers[(ROWS + at.row) * CHANNELS + at.column + e] = dbias[e];
  }
  __syncthreads();
  for (int k = threadIdx.x; k < 2 * CHANNELS; k += THREADS) {
    const int which = k / CHANNELS, channel = k % CHANNELS;
    float sum = 0.0f;
    for (int row = 0; row < ROWS; row++) sum += buffers[(which * ROWS + row) * CHANNELS + channel];
    const i64 to = batch * in.heads * in.head_channels + at.channel + channel;
    if (channel < at.own) (which ? in.dbias : in.dD)[to] = sum;
  }
}
