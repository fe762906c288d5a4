// Selective scan, backward: gradients of everything, one walk from the last tile to the first. See cuda_scan.py.
#include "common.cuh"

struct Backward {
  Rows x, dt, z, B, C, dy;  // B, C: (batch, time, head, state), heads B_head and C_head apart
  i64 B_head, C_head;
  const float* A;       // (channels, 16), negative
  const float* D;       // (channels,)
  const float* bias;    // (channels,)
  const int* document;  // (batch, time); only where DOCUMENTS
  const uint2* kept;
  Rows dx, ddt, dz;
  float* shares;  // of dB and dC: (2, batch, head, block, time, 16)
  float* dA;      // (batch, channels, 16)
  float* dD;      // (batch, channels)
  float* dbias;   // (batch, channels)
  int time, heads, head_channels, blocks;  // blocks: of a head
};

constexpr int TILE = KEPT_EVERY;
constexpr int PASSES = TILE / ROWS;
constexpr int DY_ROW = 18;                       // floats for dy of a group's 16 channels
constexpr int Y_ROW = CHANNELS + 8;              // floats for y of a step and half
constexpr int D_ROW = 2 * CHANNELS;              // floats for the gradients of dt x and of the exponent
constexpr int SHARE_ROW = 20;                    // floats for 16 states
constexpr int SHARE_PLANE = TILE * SHARE_ROW;    // dB or dC of one group
constexpr int COLUMN_STEPS = 4;                  // steps whose dB and dC fill the columns of one product

extern "C" __global__ void __launch_bounds__(THREADS) scan_backward(const Backward in) {
  SHARED(memory);
  float* const pairs = reinterpret_cast<float*>(memory);
  float* const B_tile = pairs + TILE * GROUPS * PAIR_ROW;
  float* const C_tile = B_tile + TILE * STATES;
  float* const dy_tile = C_tile + TILE * STATES;
  float* const y_sum = dy_tile + TILE * GROUPS * DY_ROW;  // (step, half, channel)
  float* const d_sum = y_sum + 2 * TILE * Y_ROW;          // (step, half, channel as `paired`, {of dt x, of the exponent})
  float* const shares = d_sum + 2 * TILE * D_ROW;         // (group, {dB, dC}, step, state)
  float2* const columns = reinterpret_cast<float2*>(shares + GROUPS * 2 * SHARE_PLANE);
  float* const same = reinterpret_cast<float*>(columns + COLUMN_STEPS * 8);

  const Place at(in.blocks, in.head_channels);
  const int block = blockIdx.x % in.blocks, groups_of_head = (in.head_channels + 15) / 16;
  const int tiles = (in.time + TILE - 1) / TILE;
  const bool kept = block * GROUPS + at.group < groups_of_head;
  const i64 batch = at.batch, first = at.channel + at.column;
  const char* const x = in.x.data + batch * in.x.batch + first * 2;
  const char* const dt = in.dt.data + batch * in.dt.batch + first * 2;
  const char* const z = in.z.data + batch * in.z.batch + first * 2;
  const char* const dy = in.dy.data + batch * in.dy.batch + first * 2;
  char* const dx = in.dx.data + batch * in.dx.batch + first * 2;
  char* const ddt = in.ddt.data + batch * in.ddt.batch + first * 2;
  char* const dz = in.dz.data + batch * in.dz.batch + first * 2;

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
  const float4* const my_pair = reinterpret_cast<const float4*>(pairs) + at.group * (PAIR_ROW / 4) + at.g;
  const float2* const my_dy = reinterpret_cast<const float2*>(dy_tile) + at.group * (DY_ROW / 2) + at.g;
  const float2* const my_B = reinterpret_cast<const float2*>(B_tile) + at.c * 2 + at.half;
  const float2* const my_C = reinterpret_cast<const float2*>(C_tile) + at.c * 2 + at.half;
  float* const my_y = y_sum + at.half * Y_ROW + at.group * 16 + at.g;
  float4* const my_d = reinterpret_cast<float4*>(d_sum) + at.half * (D_ROW / 4) + at.group * 8 + at.g;
  float* const my_share = shares + at.group * 2 * SHARE_PLANE + at.c * SHARE_ROW + 8 * at.half + at.g;
  // Operands that are constant: ones in even and in odd columns; the lanes whose state 2c, 2c + 1 is row g; for step s of
  // COLUMN_STEPS, ones in column 2s for the first rows, in 2s + 1 for the second.
  const float even = at.g % 2 ? 0.0f : 1.0f, odd = 1.0f - even;
  const float even_row = at.g == 2 * at.c ? 1.0f : 0.0f, odd_row = at.g == 2 * at.c + 1 ? 1.0f : 0.0f;
  if (threadIdx.x < COLUMN_STEPS * 8) {
    const int step = threadIdx.x / 8, column = threadIdx.x % 8;
    columns[threadIdx.x] = make_float2(column == 2 * step ? 1.0f : 0.0f, column == 2 * step + 1 ? 1.0f : 0.0f);
  }
  const float2* const my_columns = columns + at.g;

  Two next_x[PASSES], next_dt[PASSES], next_z[PASSES], next_dy[PASSES], now_x[PASSES], now_z[PASSES], now_dy[PASSES];
  float now_dt[PASSES][2], slope[PASSES][2], gate[PASSES][2];
  Selection<TILE> selection(in.B, in.B_head, in.C, in.C_head, B_tile, C_tile, at, in.time);
  uint2 next_h;
  auto fetch = [&](int start) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = start + pass * ROWS + at.row;
      const bool there = at.live && step >= 0 && step < in.time;
      next_x[pass] = load(x, step, in.x.row, there);
      next_dt[pass] = load(dt, step, in.dt.row, there);
      next_z[pass] = load(z, step, in.z.row, there);
      next_dy[pass] = load(dy, step, in.dy.row, there);
    }
    selection.fetch(start);
    next_h = make_uint2(0, 0);
    if (kept && start >= 0) next_h = in.kept[kept_at(at, tiles, start / TILE, groups_of_head, in.heads, block)];
  };
  auto put = [&](int start) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = pass * ROWS + at.row;
      now_x[pass] = next_x[pass], now_z[pass] = next_z[pass], now_dy[pass] = next_dy[pass];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Softplus positive(next_dt[pass][e] + bias[e]);
        now_dt[pass][e] = start + step < in.time ? positive.value : 0.0f;
        slope[pass][e] = positive.slope, gate[pass][e] = sigmoid(now_z[pass][e]);
        reinterpret_cast<float2*>(pairs)[paired(step, at.column + e, PAIR_ROW / 2)] =
            make_float2(now_dt[pass][e], now_dt[pass][e] * now_x[pass][e]);
        dy_tile[paired(step, at.column + e, DY_ROW)] = now_dy[pass][e] * now_z[pass][e] * gate[pass][e];
      }
    }
    selection.put();
#if DOCUMENTS
    if (threadIdx.x < TILE) {
      const int step = start + threadIdx.x;
      const int* here = in.document + batch * in.time + step;
      same[threadIdx.x] = step <= 0 || step >= in.time || here[0] == here[-1] ? 1.0f : 0.0f;
    }
#endif
  };
  const int last = (tiles - 1) * TILE;
  fetch(last);

  for (int start = last; start >= 0; start -= TILE) {
    put(start);
    float h[TILE + 1][4], decay[TILE][4];
    h[0][0] = low(next_h.x), h[0][1] = high(next_h.x), h[0][2] = low(next_h.y), h[0][3] = high(next_h.y);
    fetch(start - TILE);
    __syncthreads();

    // The states of the tile again, and y. What the next step reads is asked for before this one stores: the compiler
    // keeps that order. A product's sums are stored a step later, when they are there.
    {
      float4 pair = my_pair[0];
      float2 B_now = my_B[0], C_now = my_C[0];
      float before[4];
#pragma unroll
      for (int step = 0; step < TILE; step++) {
        const int after = step + 1 < TILE ? step + 1 : step;
        const float4 next_pair = my_pair[after * GROUPS * (PAIR_ROW / 4)];
        const float2 next_B = my_B[after * (STATES / 2)], next_C = my_C[after * (STATES / 2)];
        float(&now)[4] = h[step + 1];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          decay[step][k] = ex2((k < 2 ? pair.x : pair.z) * A[k]);
#if DOCUMENTS
          decay[step][k] *= same[step];
#endif
          now[k] = fmaf(decay[step][k], h[step][k], (k < 2 ? pair.y : pair.w) * (k % 2 ? B_now.y : B_now.x));
        }
        if (step) my_y[(step - 1) * 2 * Y_ROW] = before[0], my_y[(step - 1) * 2 * Y_ROW + 8] = before[2];
        product(before, now[0], now[2], now[1], now[3], C_now.x, C_now.y);
        pair = next_pair, B_now = next_B, C_now = next_C;
      }
      my_y[(TILE - 1) * 2 * Y_ROW] = before[0], my_y[(TILE - 1) * 2 * Y_ROW + 8] = before[2];
    }

    // Backwards through the tile; a product's sums are used a step later.
    //   sums     over states, of which the lane's two are added before: of dh B (the gradient of dt x) in even columns, of
    //            the exponent's gradient in odd ones
    //   turned   over the lane's two channels, rows (lanes g) and columns (states) exchanged: dB above, dC below
    //   total    over all 16 channels, steps in columns
    float sums[4], turned[4], total[4];
    auto finish = [&](int step) {
      if (at.c == 0) my_d[step * 2 * (D_ROW / 4)] = make_float4(sums[0], sums[1], sums[2], sums[3]);  // all c have these
      const float2 column = my_columns[step % COLUMN_STEPS * 8];
      if (step % COLUMN_STEPS == COLUMN_STEPS - 1)
        product(total, turned[0], turned[1], turned[2], turned[3], column.x, column.y);
      else
        add_product(total, turned[0], turned[1], turned[2], turned[3], column.x, column.y);
      if (step % COLUMN_STEPS == 0) {
        my_share[step * SHARE_ROW] = total[0] + total[2];
        my_share[SHARE_PLANE + step * SHARE_ROW] = total[1] + total[3];
      }
    };
    float4 pair = my_pair[(TILE - 1) * GROUPS * (PAIR_ROW / 4)];
    float2 dy_now = my_dy[(TILE - 1) * GROUPS * (DY_ROW / 2)];
    float2 B_now = my_B[(TILE - 1) * (STATES / 2)], C_now = my_C[(TILE - 1) * (STATES / 2)];
#pragma unroll
    for (int step = TILE - 1; step >= 0; step--) {
      const int after = step ? step - 1 : step;
      const float4 next_pair = my_pair[after * GROUPS * (PAIR_ROW / 4)];
      const float2 next_dy = my_dy[after * GROUPS * (DY_ROW / 2)];
      const float2 next_B = my_B[after * (STATES / 2)], next_C = my_C[after * (STATES / 2)];
      float dh[4], q[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        dh[k] = fmaf(k < 2 ? dy_now.x : dy_now.y, k % 2 ? C_now.y : C_now.x, carried[k]);
        carried[k] = dh[k] * decay[step][k];
        q[k] = carried[k] * h[step][k];
        dA[k] = fmaf(q[k], k < 2 ? pair.x : pair.z, dA[k]);
      }
      float du[2], exponent[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        du[i] = fmaf(dh[2 * i], B_now.x, dh[2 * i + 1] * B_now.y);
        exponent[i] = fmaf(q[2 * i], A[2 * i], q[2 * i + 1] * A[2 * i + 1]);
      }
      const float(&now)[4] = h[step + 1];
      const float dB[2] = {fmaf(dh[0], pair.y, dh[2] * pair.w), fmaf(dh[1], pair.y, dh[3] * pair.w)};
      const float dC[2] = {fmaf(now[0], dy_now.x, now[2] * dy_now.y), fmaf(now[1], dy_now.x, now[3] * dy_now.y)};
      if (step < TILE - 1) finish(step + 1);
      product(sums, du[0], du[1], exponent[0], exponent[1], even, odd);
      product(turned, even_row, 0.0f, odd_row, 0.0f, dB[0], dB[1]);
      add_product(turned, 0.0f, even_row, 0.0f, odd_row, dC[0], dC[1]);
      pair = next_pair, dy_now = next_dy, B_now = next_B, C_now = next_C;
    }
    finish(0);
    __syncthreads();

#pragma unroll
    for (int k = 0; k < (TILE * STATES + THREADS - 1) / THREADS; k++) {  // {dB, dC} x TILE x 8 pairs of states
      const int two = threadIdx.x + k * THREADS, plane = two / (TILE * 8), step = two / 8 % TILE, state = two % 8 * 2;
      if (two >= TILE * STATES) break;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        const float2 part =
            *reinterpret_cast<const float2*>(shares + (group * 2 + plane) * SHARE_PLANE + step * SHARE_ROW + state);
        sum.x += part.x, sum.y += part.y;
      }
      const i64 blocks = static_cast<i64>(in.heads) * in.blocks, batches = gridDim.y;
      const i64 to = (((plane * batches + batch) * blocks + blockIdx.x) * in.time + start + step) * STATES + state;
      if (start + step < in.time) *reinterpret_cast<float2*>(in.shares + to) = sum;
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = pass * ROWS + at.row;
      float out_x[2], out_dt[2], out_z[2];
      const float2* const y_at = reinterpret_cast<const float2*>(y_sum + step * 2 * Y_ROW + at.column);
      const float2 y_first = y_at[0], y_second = y_at[Y_ROW / 2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float2* const d_at = reinterpret_cast<const float2*>(d_sum) + step * D_ROW +
                                   paired(0, at.column + e, CHANNELS / GROUPS);
        const float du = d_at[0].x + d_at[D_ROW / 2].x, exponent = d_at[0].y + d_at[D_ROW / 2].y;
        const float x_now = now_x[pass][e], z_now = now_z[pass][e], dy_e = now_dy[pass][e], dt_now = now_dt[pass][e];
        const float y = fmaf(D[e], x_now, e ? y_first.y + y_second.y : y_first.x + y_second.x);
        const float open = gate[pass][e], gated = dy_e * z_now * open;
        out_x[e] = fmaf(du, dt_now, D[e] * gated);
        out_dt[e] = fmaf(exponent, LN2, du * x_now) * slope[pass][e];
        out_z[e] = dy_e * y * open * (1.0f + z_now * (1.0f - open));
        dD[e] = fmaf(gated, x_now, dD[e]);
        dbias[e] += out_dt[e];
      }
      if (at.live && start + step < in.time) {
        store(dx, start + step, in.dx.row, out_x[0], out_x[1]);
        store(ddt, start + step, in.ddt.row, out_dt[0], out_dt[1]);
        store(dz, start + step, in.dz.row, out_z[0], out_z[1]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int channel = at.group * 16 + at.g + 8 * i, state = at.half * 8 + at.c * 2;
    const i64 to = ((batch * in.heads * in.head_channels) + at.channel + channel) * STATES + state;
    if (channel < at.own) *reinterpret_cast<float2*>(in.dA + to) = make_float2(dA[2 * i], dA[2 * i + 1]);
  }
  // Sums over the rows of the flat layout.
  __syncthreads();
#pragma unroll
  for (int e = 0; e < 2; e++) {
    pairs[at.row * CHANNELS + at.column + e] = dD[e];
    pairs[(ROWS + at.row) * CHANNELS + at.column + e] = dbias[e];
  }
  __syncthreads();
  for (int k = threadIdx.x; k < 2 * CHANNELS; k += THREADS) {
    const int which = k / CHANNELS, channel = k % CHANNELS;
    float sum = 0.0f;
    for (int row = 0; row < ROWS; row++) sum += pairs[(which * ROWS + row) * CHANNELS + channel];
    const i64 to = batch * in.heads * in.head_channels + at.channel + channel;
    if (channel < at.own) (which ? in.dbias : in.dD)[to] = sum;
  }
}
