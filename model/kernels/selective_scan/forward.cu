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
constexpr int STREAMED = 3 * PASSES + Selection<TILE>::WORDS + 2;  // words of a thread: three inputs, B or C, documents
constexpr int PLANES = 8;  // of sums over the two states of a lane: one a c and half
constexpr int PLANE_ROW = CHANNELS + 8;
static_assert(TILE % KEPT_EVERY == 0 && TILE % ROWS == 0, "tiles are whole passes");
static_assert(SHARED_FLOATS == TILE * (GROUPS * PAIR_ROW + SELECTED + PLANES * PLANE_ROW + 1) + STREAMED * THREADS,
              "cuda_scan.py knows how much shared memory this takes");

extern "C" __global__ void __launch_bounds__(THREADS, 2) scan_forward(const Forward in) {
  SHARED(memory);
  float* const pairs = reinterpret_cast<float*>(memory);
  float* const selected = pairs + TILE * GROUPS * PAIR_ROW;
  float* const sums = selected + TILE * SELECTED;        // (step, plane, channel)
  float* const same = sums + TILE * PLANES * PLANE_ROW;  // 0 where a document begins
  u32* const words = reinterpret_cast<u32*>(same + TILE) + threadIdx.x;  // of this thread: on their way

  const Place at(in.blocks, in.head_channels);
  const int block = blockIdx.x % in.blocks, groups_of_head = (in.head_channels + 15) / 16;
  const int kept_tiles = (in.time + KEPT_EVERY - 1) / KEPT_EVERY;
  const bool keeps = in.kept != nullptr && block * GROUPS + at.group < groups_of_head;
  // What is read and written moves from tile to tile.
  const auto data = [&](const Rows& rows) { return rows.data + at.batch * rows.batch + (at.channel + at.column) * 2; };
  const auto stream = [&](const Rows& rows, int which) {
    return Stream<PASSES, ROWS>(data(rows), rows.row, 0, at.row, which * PASSES);
  };
  auto x = stream(in.x, 0), dt = stream(in.dt, 1), z = stream(in.z, 2);
  Selection<TILE> selection(in.B, in.B_head, in.C, in.C_head, at, 0, 3 * PASSES);
#if DOCUMENTS
  Borders<TILE> borders(in.document, at, in.time, 0, 3 * PASSES + Selection<TILE>::WORDS);
#endif
  char* y = data(in.y) + static_cast<i64>(at.row) * in.y.row;
  uint2* states = in.kept + kept_at(at, kept_tiles, 0, groups_of_head, in.heads, block);
  const i64 states_tile = static_cast<i64>(in.heads) * groups_of_head * 64;

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
  const float4* const my_BC = reinterpret_cast<const float4*>(selected) + at.c * 2 + at.half;
  float* const my_sum = sums + (at.half * 4 + at.c) * PLANE_ROW + at.group * 16 + at.g;

  Two now_x[PASSES], now_z[PASSES];
  auto ask = [&](int steps) {  // steps: of the tile and after it
    x.ask(words, at.live, steps, 1), dt.ask(words, at.live, steps, 1), z.ask(words, at.live, steps, 1);
    selection.stream.ask(words, true, steps, 1);
#if DOCUMENTS
    borders.ask(words, true, steps, 1);
#endif
    asked();
  };
  auto put = [&](int start) {
    copied<0>();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int step = pass * ROWS + at.row;
      const Two raw = dt.get(words, pass);
      now_x[pass] = x.get(words, pass), now_z[pass] = z.get(words, pass);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Softplus positive(raw[e] + bias[e]);
        reinterpret_cast<float2*>(pairs)[paired(step, at.column + e, PAIR_ROW / 2)] =
            make_float2(positive.value, positive.value * now_x[pass][e]);
      }
    }
    selection.put(words, selected);
#if DOCUMENTS
    borders.put(words, start, same);
#endif
  };
  ask(in.time);
  put(0);

  for (int start = 0; start < in.time; start += TILE) {
    ask(in.time - start - TILE);
    __syncthreads();

    float4 pair = my_pair[0], next_pair = my_pair[GROUPS * (PAIR_ROW / 4)], BC_now = my_BC[0];
    float decay[4];
#pragma unroll
    for (int k = 0; k < 4; k++) decay[k] = ex2((k < 2 ? pair.x : pair.z) * A[k]);
#pragma unroll
    for (int step = 0; step < TILE; step++) {
      if (step % KEPT_EVERY == 0) {
        if (keeps && start + step < in.time) *states = make_uint2(pack(h[0], h[1]), pack(h[2], h[3]));
        states += states_tile;
      }
      // What the next steps need is asked for before this step's sums are stored: the compiler keeps that order. Decays
      // are computed a step ahead.
      const int after = step + 1 < TILE ? step + 1 : step, later = step + 2 < TILE ? step + 2 : step;
      const float4 later_pair = my_pair[later * GROUPS * (PAIR_ROW / 4)], next_BC = my_BC[after * (SELECTED / 4)];
      float next_decay[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        next_decay[k] = ex2((k < 2 ? next_pair.x : next_pair.z) * A[k]);
#if DOCUMENTS
        decay[k] *= same[step];
#endif
        h[k] = fmaf(decay[k], h[k], (k < 2 ? pair.y : pair.w) * (k % 2 ? BC_now.y : BC_now.x));
      }
      my_sum[step * PLANES * PLANE_ROW] = fmaf(BC_now.w, h[1], BC_now.z * h[0]);
      my_sum[step * PLANES * PLANE_ROW + 8] = fmaf(BC_now.w, h[3], BC_now.z * h[2]);
      pair = next_pair, next_pair = later_pair, BC_now = next_BC;
#pragma unroll
      for (int k = 0; k < 4; k++) decay[k] = next_decay[k];
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
      for (int e = 0; e < 2; e++) out[e] *= Gate(now_z[pass][e]).value;
      store(y + static_cast<i64>(pass * ROWS) * in.y.row, out[0], out[1], at.live && start + step < in.time);
    }
    y += TILE * in.y.row;
    put(start + TILE);
  }
}
