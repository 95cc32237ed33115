// Attention of small samples: one block owns a whole (sample, head), so that nothing is streamed and the backward makes
// d_q, d_k, d_v and the dense bias gradient in one pass, without atomics, in a fixed order.
//
// Dense bias, flat as in dig_kernels/layout.py. The longest sample is set by shared memory: see small_backward_bytes.
#pragma once

#include "stripe.cuh"

namespace dig {

__host__ __device__ constexpr int multiple(int of, int length) { return (length + of - 1) / of * of; }

struct DenseBias {
    PairBlock block;
    int first_row;
    int first_column;

    __device__ float4 four(int row, int column) const { return block.four(first_row + row, first_column + column); }
};

template <typename T, int D> struct SmallForwardShared {
    T *q, *k, *v;    // q [multiple of 16][kRow], k and v [multiple of 32][kRow]
    float* stripes;  // one per warp
    float* rows;     // 16 per warp

    __host__ __device__ SmallForwardShared(Arena& arena, int length, int warps) {
        q = arena.take<T>(multiple(16, length) * kPitch<T, D>);
        k = arena.take<T>(multiple(kColumns, length) * kPitch<T, D>);
        v = arena.take<T>(multiple(kColumns, length) * kPitch<T, D>);
        stripes = arena.take<float>(warps * kStripeFloats);
        rows = arena.take<float>(warps * 16);
    }
};

// Weights and logit gradients have a pitch of their own, 16 bytes more than the padded length.
template <typename T, int D> struct SmallBackwardShared {
    T *q, *k, *v, *d_out;   // [padded][kRow]
    T *weights, *d_logits;  // [padded][pitch]
    float *lse, *delta;     // [padded]
    int padded;
    int pitch;

    __host__ __device__ SmallBackwardShared(Arena& arena, int length) {
        padded = multiple(16, length);
        pitch = padded + 16 / static_cast<int>(sizeof(T));
        q = arena.take<T>(padded * kPitch<T, D>);
        k = arena.take<T>(padded * kPitch<T, D>);
        v = arena.take<T>(padded * kPitch<T, D>);
        d_out = arena.take<T>(padded * kPitch<T, D>);
        weights = arena.take<T>(padded * pitch);
        d_logits = arena.take<T>(padded * pitch);
        lse = arena.take<float>(padded);
        delta = arena.take<float>(padded);
    }
};

template <typename T, int D> size_t small_forward_bytes(int length, int warps) {
    Arena arena{nullptr};
    SmallForwardShared<T, D> layout(arena, length, warps);
    return arena.used;
}

template <typename T, int D> size_t small_backward_bytes(int length) {
    Arena arena{nullptr};
    SmallBackwardShared<T, D> layout(arena, length);
    return arena.used;
}

constexpr int kSmallThreads = 256;  // at most; fewer warps where there are fewer stripes

template <typename T, int D>
__global__ void __launch_bounds__(kSmallThreads, D == 32 ? 2 : 1) small_block_forward(const SmallBlockAttention a) {
    const Packed& packed = a.base.packed;
    const Sample sample = sample_at(packed, blockIdx.x / packed.heads);
    const int head = blockIdx.x % packed.heads, length = sample.length, warps = blockDim.x / 32;
    if (length == 0) return;
    DIG_DYNAMIC_SHARED(memory);
    Arena arena{memory};
    const SmallForwardShared<T, D> shared(arena, length, warps);
    const TileIndex<T> index = tile_index<T>(shared.stripes);
    load_rows<T, D>(shared.q, a.base.q, sample, 0, multiple(16, length), head, packed.width);
    load_rows<T, D>(shared.k, a.base.k, sample, 0, multiple(kColumns, length), head, packed.width);
    load_rows<T, D>(shared.v, a.base.v, sample, 0, multiple(kColumns, length), head, packed.width);
    __syncthreads();
    const PairBlock bias = block_of(a.bias, sample.pair_offset, packed.heads, head, length);
    float* stripe = shared.stripes + warp_id() * kStripeFloats;
    float* rows = shared.rows + warp_id() * 16;
    for (int first_row = 16 * warp_id(); first_row < length; first_row += 16 * warps) {
        Tile<T> out[D / 16];
        RowState state;
        clear(out);
        for (int first = 0; first < length; first += kColumns) {
            const uint32_t on = keys_on(packed, sample, first);
            const int column = first * kPitch<T, D>;
            attend<T, D>(shared.q + first_row * kPitch<T, D>, shared.k + column, shared.v + column, stripe, rows, on,
                         a.base.scale, DenseBias{bias, first_row, first}, index, state, out);
        }
        finish_rows(a.base, sample, first_row, head, rows, index, state, out);
    }
}

// Weights P and logit gradients dS of 16 queries, to shared memory; dS also is the gradient of the bias.
template <typename T, int D>
__device__ void small_row_gradients(const SmallBlockAttention& a, const SmallBackwardShared<T, D>& shared,
                                    const Sample& sample, int head, int first_row, const TileIndex<T>& index) {
    constexpr int kRow = kPitch<T, D>;
    const Packed& packed = a.base.packed;
    const PairBlock bias = block_of(a.bias, sample.pair_offset, packed.heads, head, sample.length);
    const PairBlock d_bias = block_of(a.d_bias, sample.pair_offset, packed.heads, head, sample.length);
    for (int first = 0; first < shared.padded; first += 16) {
        Tile<T> logits[1], d_weights[1];
        clear(logits);
        clear(d_weights);
        add_product<Order::Rows, Order::Columns>(logits, shared.q + first_row * kRow, kRow, shared.k + first * kRow, kRow, D / 16);
        add_product<Order::Rows, Order::Columns>(d_weights, shared.d_out + first_row * kRow, kRow, shared.v + first * kRow,
                                                 kRow, D / 16);
        const uint32_t on = keys_on(packed, sample, first);
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) {
            const int row = first_row + index.row(i), column = first + index.column(i);
            const float logit = a.base.scale * logits[0][i] + bias.at(row, column);
            const bool live = (on >> index.column(i) & 1) && row < sample.length;
            const float weight = live ? exponential<T>(logit - shared.lse[row]) : 0.0f;
            const float d_logit = weight * (d_weights[0][i] - shared.delta[row]);
            shared.weights[row * shared.pitch + column] = rounded<T>(weight);
            shared.d_logits[row * shared.pitch + column] = rounded<T>(d_logit);
            d_bias.set(row, column, d_logit);
        }
    }
    __syncwarp();
}

template <typename T, int D>
__global__ void __launch_bounds__(kSmallThreads, D == 32 ? 2 : 1) small_block_backward(const SmallBlockAttention a) {
    constexpr int kRow = kPitch<T, D>;
    const Packed& packed = a.base.packed;
    const Sample sample = sample_at(packed, blockIdx.x / packed.heads);
    const int head = blockIdx.x % packed.heads, length = sample.length, step = blockDim.x / 2;
    if (length == 0) return;
    DIG_DYNAMIC_SHARED(memory);
    Arena arena{memory};
    const SmallBackwardShared<T, D> shared(arena, length);
    const TileIndex<T> index = tile_index<T>(reinterpret_cast<float*>(memory));
    load_rows<T, D>(shared.q, a.base.q, sample, 0, shared.padded, head, packed.width);
    load_rows<T, D>(shared.k, a.base.k, sample, 0, shared.padded, head, packed.width);
    load_rows<T, D>(shared.v, a.base.v, sample, 0, shared.padded, head, packed.width);
    load_rows<T, D>(shared.d_out, a.base.d_out, sample, 0, shared.padded, head, packed.width);
    for (int row = threadIdx.x; row < shared.padded; row += blockDim.x) {
        const bool here = row < length;
        shared.lse[row] = here ? a.base.lse[head * packed.sites + sample.begin + row] : 0.0f;
        shared.delta[row] = here ? delta_of<T>(a.base, sample.begin + row, head) : 0.0f;
    }
    __syncthreads();
    for (int first = 16 * warp_id(); first < length; first += step) {
        small_row_gradients<T, D>(a, shared, sample, head, first, index);
        Tile<T> d_q[D / 16];
        clear(d_q);
        add_product<Order::Rows, Order::Rows>(d_q, shared.d_logits + first * shared.pitch, shared.pitch, shared.k, kRow,
                                              shared.padded / 16);
        store_rows(a.base.d_q, sample, first, head, packed.width, index, d_q, [&](int) { return a.base.scale; });
    }
    __syncthreads();
    for (int first = 16 * warp_id(); first < length; first += step) {
        Tile<T> d_k[D / 16], d_v[D / 16];
        clear(d_k);
        clear(d_v);
        add_product<Order::Columns, Order::Rows>(d_k, shared.d_logits + first, shared.pitch, shared.q, kRow, shared.padded / 16);
        add_product<Order::Columns, Order::Rows>(d_v, shared.weights + first, shared.pitch, shared.d_out, kRow, shared.padded / 16);
        store_rows(a.base.d_k, sample, first, head, packed.width, index, d_k, [&](int) { return a.base.scale; });
        store_rows(a.base.d_v, sample, first, head, packed.width, index, d_v, [](int) { return 1.0f; });
    }
}

}  // namespace dig
