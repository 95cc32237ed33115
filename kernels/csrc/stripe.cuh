// Attention of one warp's 16 queries over 32 keys at a time, with the running softmax of flash attention.
//
// Logits go from tiles to the warp's stripe of shared memory, where two lanes own a row: they add the bias, update the
// row's maximum and sum, and leave the weights in the operand's type in the same place.
#pragma once

#include "packed.cuh"

namespace dig {

constexpr int kStripePitch = kColumns + 4;           // floats; 4 more spread the rows over the banks
constexpr int kStripeFloats = 16 * kStripePitch;     // one stripe of 16 rows
template <typename T> constexpr int kWeightPitch = kStripePitch * 4 / static_cast<int>(sizeof(T));

// Both lanes of a row hold the same two numbers.
struct RowState {
    float top = kMasked;
    float total = 0.0f;
};

__device__ inline void store_four(float* to, const float* x) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
}

__device__ inline void store_four(bf16* to, const float* x) {
    const auto both = [&](int c) {
        return __bfloat16_as_ushort(rounded<bf16>(x[c])) | static_cast<uint32_t>(__bfloat16_as_ushort(rounded<bf16>(x[c + 1]))) << 16;
    };
    *reinterpret_cast<uint2*>(to) = {both(0), both(2)};
}

// Logits in the stripe become weights exp(logit - top); returns the factor by which older sums of the row shrink.
template <typename T, typename Bias>
__device__ float softmax_step(float* stripe, uint32_t on, float scale, const Bias& bias, RowState& state) {
    const int row = lane_id() / 2, half = 16 * (lane_id() % 2);
    float x[16];
    float top = state.top;
#pragma unroll
    for (int c = 0; c < 16; c += 4) {
        const float4 logit = *reinterpret_cast<const float4*>(stripe + row * kStripePitch + half + c);
        const float4 added = bias.four(row, half + c);
        const float sums[4] = {scale * logit.x + added.x, scale * logit.y + added.y, scale * logit.z + added.z,
                               scale * logit.w + added.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            x[c + e] = on >> (half + c + e) & 1 ? sums[e] : kMasked;
            top = fmaxf(top, x[c + e]);
        }
    }
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    __syncwarp();  // all logits are read before weights take their place
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < 16; ++c) {
        x[c] = on >> (half + c) & 1 ? exponential<T>(x[c] - top) : 0.0f;
        sum += x[c];
    }
    T* weights = reinterpret_cast<T*>(stripe) + row * kWeightPitch<T> + half;
#pragma unroll
    for (int c = 0; c < 16; c += 4) store_four(weights + c, x + c);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    const float keep = exponential<T>(state.top - top);
    state.total = state.total * keep + sum;
    state.top = top;
    return keep;
}

// 32 keys (rows of k and v in shared memory) are added to the warp's sums. `rows` holds 16 floats of the warp's own.
template <typename T, int D, typename Bias>
__device__ void attend(const T* q, const T* k, const T* v, float* stripe, float* rows, uint32_t on, float scale,
                       const Bias& bias, const TileIndex<T>& index, RowState& state, Tile<T> (&out)[D / 16]) {
    constexpr int kRow = kPitch<T, D>;
    Tile<T> logits[kColumns / 16];
    clear(logits);
    add_product<Order::Rows, Order::Columns>(logits, q, kRow, k, kRow, D / 16);
#pragma unroll
    for (int t = 0; t < kColumns / 16; ++t) logits[t].store(stripe + 16 * t, kStripePitch);
    __syncwarp();
    const float keep = softmax_step<T>(stripe, on, scale, bias, state);
    if (lane_id() % 2 == 0) rows[lane_id() / 2] = keep;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) out[n][i] *= rows[index.row(i)];
    }
    const T* weights = reinterpret_cast<const T*>(stripe);
    add_product<Order::Rows, Order::Rows>(out, weights, kWeightPitch<T>, v, kRow, kColumns / 16);
    __syncwarp();  // the stripe is free again
}

// Normalised sums and log-sum-exp of the warp's 16 queries go to memory; a row without keys gives 0 and kMasked.
template <typename T, int N>
__device__ void finish_rows(const Attention& a, const Sample& sample, int first, int head, float* rows,
                            const TileIndex<T>& index, const RowState& state, Tile<T> (&out)[N]) {
    const int row = lane_id() / 2;
    const bool empty = state.total == 0.0f;
    if (lane_id() % 2 == 0) {
        rows[row] = empty ? 0.0f : 1.0f / state.total;
        if (first + row < sample.length)
            a.lse[head * a.packed.sites + sample.begin + first + row] = empty ? kMasked : state.top + logf(state.total);
    }
    __syncwarp();
    store_rows(a.out, sample, first, head, a.packed.width, index, out, [&](int r) { return rows[r]; });
    __syncwarp();
}

}  // namespace dig
