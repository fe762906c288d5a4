// Selective scan, forward: y, and the states that the backward pass begins its tiles with. See cuda_scan.py.
#include "common.cuh"

struct Forward {
  Rows x, dt, z, B, C;  // B, C: (batch, time, head, state), heads B_head and C_head apart
  i64 B_head, C_head;
  const float* A;       // (channels, 16), negative
  const float* D;       // (channels,)
  const float* bias;    // (channels,)
  const int* document;  // (batch, time); only where DOCUMENTS
  Rows y;
  uint2* kept;          // null: none
  int time, heads, head_channels, blocks;  // blocks: of a head
};

constexpr int TILE = FORWARD_TILE;
constexpr int PASSES = TILE / ROWS;
constexpr int PLANES = 8;  // of sums over the two states of a lane: one a c and half
constexpr int PLANE_ROW = CHANNELS + 8;
static_assert(KEPT_EVERY % ROWS == 0 && TILE % ROWS == 0, "tiles are whole passes");

extern "C" __global__ void __launch_bounds__(THREADS) scan_forward(const Forward in) {
  SHARED(memory);
  float* const pairs = reinterpret_cast<float*>(memory);
  float* const B_tile = pairs + TILE * GROUPS * PAIR_ROW;
  float* const C_tile = B_tile + TILE * STATES;
  float* const sums = C_tile + TILE * STATES;            // (step, plane, channel)
  float* const same = sums + TILE * PLANES * PLANE_ROW;  // 0 where a document begins

  const Place at(in.blocks, in.head_channels);
  const int block = blockIdx.x % in.blocks, groups_of_head = (in.head_channels + 15) / 16;
  const int kept_tiles = (in.time + KEPT_EVERY - 1) / KEPT_EVERY;
  const bool keeps = in.kept != nullptr && block * GROUPS + at.group < groups_of_head;
  const i64 first = (at.channel + at.column) * 2;
  const char* const x = in.x.data + at.batch * in.x.batch + first;
  const char* const dt = in.dt.data + at.batch * in.dt.batch + first;
  const char* const z = in.z.data + at.batch * in.z.batch + first;
  char* const y = in.y.data + at.batch * in.y.batch + first;

  float A[4], h[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int channel = at.group * 16 + at.g + k / 2 * 8, state = at.half * 8 + at.c * 2 + k % 2;
    A[k] = channel < at.own ? in.A[(at.channel + channel) * STATES + state] * LOG2E : 0.0f;
    h[k] = 0.0f;
  }
  float D[2], bias[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    D[e] = at.live ? in.D[at.channel + at.column + e] : 0.0f;
    bias[e] = at.live ? in.bias[at.channel + at.column + e] : 0.0f;
  }
  // Where this lane reads and writes in a step.
  const float4* const my_pair = reinterpret_cast<const float4*>(pairs) + at.group * (PAIR_ROW / 4) + at.g;
  const float2* const my_B = reinterpret_cast<const float2*>(B_tile) + at.c * 2 + at.half;
  const float2* const my_C = reinterpret_cast<const float2*>(C_tile) + at.c * 2 + at.half;
  float* const my_sum = sums + (at.half * 4 + at.c) * PLANE_ROW + at.group * 16 + at.g;

  Two next_x[PASSES], next_dt[PASSES], next_z[PASSES], now_x[PASSES], now_z[PASSES];
  Selection<TILE> selection(in.B, in.B_head, in.C, in.C_head, B_tile, C_tile, at, in.time);
  auto fetch = [&](int start) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = start + pass * ROWS + at.row;
      const bool there = at.live && step < in.time;
      next_x[pass] = load(x, step, in.x.row, there);
      next_dt[pass] = load(dt, step, in.dt.row, there);
      next_z[pass] = load(z, step, in.z.row, there);
    }
    selection.fetch(start);
  };
  auto put = [&](int start) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = pass * ROWS + at.row;
      now_x[pass] = next_x[pass], now_z[pass] = next_z[pass];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Softplus positive(next_dt[pass][e] + bias[e]);
        const float value = start + step < in.time ? positive.value : 0.0f;
        reinterpret_cast<float2*>(pairs)[paired(step, at.column + e, PAIR_ROW / 2)] =
            make_float2(value, value * now_x[pass][e]);
      }
    }
    selection.put();
#if DOCUMENTS
    if (threadIdx.x < TILE) {
      const int step = start + threadIdx.x;
      const int* here = in.document + at.batch * in.time + step;
      same[threadIdx.x] = step == 0 || step >= in.time || here[0] == here[-1] ? 1.0f : 0.0f;
    }
#endif
  };
  fetch(0);
  put(0);

  for (int start = 0; start < in.time; start += TILE) {
    __syncthreads();
    fetch(start + TILE);

    float4 pair = my_pair[0];
    float2 B_now = my_B[0], C_now = my_C[0];
#pragma unroll
    for (int step = 0; step < TILE; step++) {
      if (step % ROWS == 0 && (start + step) % KEPT_EVERY == 0 && keeps && start + step < in.time)
        in.kept[kept_at(at, kept_tiles, (start + step) / KEPT_EVERY, groups_of_head, in.heads, block)] =
            make_uint2(pack(h[0], h[1]), pack(h[2], h[3]));
      // The next step's values are asked for before this step's are stored: the compiler keeps that order.
      const int after = step + 1 < TILE ? step + 1 : step;
      const float4 next_pair = my_pair[after * GROUPS * (PAIR_ROW / 4)];
      const float2 next_B = my_B[after * (STATES / 2)], next_C = my_C[after * (STATES / 2)];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float decay = ex2((k < 2 ? pair.x : pair.z) * A[k]);
#if DOCUMENTS
        decay *= same[step];
#endif
        h[k] = fmaf(decay, h[k], (k < 2 ? pair.y : pair.w) * (k % 2 ? B_now.y : B_now.x));
      }
      my_sum[step * PLANES * PLANE_ROW] = fmaf(C_now.y, h[1], C_now.x * h[0]);
      my_sum[step * PLANES * PLANE_ROW + 8] = fmaf(C_now.y, h[3], C_now.x * h[2]);
      pair = next_pair, B_now = next_B, C_now = next_C;
    }
    __syncthreads();

    // What follows the tile, and what the next one needs, together: each waits much.
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = pass * ROWS + at.row;
      float out[2] = {D[0] * now_x[pass][0], D[1] * now_x[pass][1]};
#pragma unroll
      for (int plane = 0; plane < PLANES; plane++) {
        const float2 part = *reinterpret_cast<const float2*>(sums + (step * PLANES + plane) * PLANE_ROW + at.column);
        out[0] += part.x, out[1] += part.y;
      }
#pragma unroll
      for (int e = 0; e < 2; e++) out[e] *= now_z[pass][e] * sigmoid(now_z[pass][e]);
      if (at.live && start + step < in.time) store(y, start + step, in.y.row, out[0], out[1]);
    }
    put(start + TILE);
  }
}
