// The two backward passes of table_attention.cuh: d_q and delta with queries as rows, then d_k and d_v with keys as rows.
// Both rebuild the weights from the saved log-sum-exp; P = exp(S - lse), dS = P (dO V^T - delta).
#pragma once

#include "table_attention.cuh"

namespace dig {

// lse and delta of the block's queries in shared memory [2][heads][rows]; delta also goes to memory for the key pass.
template <typename T, int ROWS>
__device__ void load_query_rows(float* to, const Attention& a, const TableBlock& block, int heads_of_shape) {
    for (int e = threadIdx.x; e < block.heads * ROWS; e += blockDim.x) {
        const int g = e / ROWS, row = block.first_row + e % ROWS, head = block.first_head + g;
        const bool here = row < block.sample.length;
        const int64_t site = block.sample.begin + row, at = head * a.packed.sites + site;
        const float delta = here ? delta_of<T>(a, site, head) : 0.0f;
        if (here) a.delta[at] = delta;
        to[e] = here ? a.lse[at] : 0.0f;
        to[heads_of_shape * ROWS + e] = delta;
    }
}

// The same for 32 streamed queries; beyond the sample lse is so large that the weights are 0.
__device__ inline void load_query_columns(float* to, const Attention& a, const TableBlock& block, int first, int heads_of_shape) {
    for (int e = threadIdx.x; e < block.heads * kColumns; e += blockDim.x) {
        const int g = e / kColumns, query = first + e % kColumns;
        const bool here = query < block.sample.length;
        const int64_t at = (block.first_head + g) * a.packed.sites + block.sample.begin + query;
        to[e] = here ? a.lse[at] : -kMasked;
        to[heads_of_shape * kColumns + e] = here ? a.delta[at] : 0.0f;
    }
}

// d_q += dS K for the warp's 16 queries and 32 keys.
template <typename T, int D, typename Bias>
__device__ void add_query_gradient(const T* q, const T* d_out, const T* k, const T* v, T* stripe, const float* lse,
                                   const float* delta, uint32_t on, float scale, const Bias& bias,
                                   const TileIndex<T>& index, Tile<T> (&d_q)[D / 16]) {
    constexpr int kRow = kPitch<T, D>;
#pragma unroll 1
    for (int t = 0; t < kColumns / 16; ++t) {
        Tile<T> logits[1], d_weights[1];
        clear(logits);
        clear(d_weights);
        add_product<Order::Rows, Order::Columns>(logits, q, kRow, k + 16 * t * kRow, kRow, D / 16);
        add_product<Order::Rows, Order::Columns>(d_weights, d_out, kRow, v + 16 * t * kRow, kRow, D / 16);
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) {
            const int row = index.row(i), column = 16 * t + index.column(i);
            const float logit = scale * logits[0][i] + bias.at(row, column);
            const float weight = on >> column & 1 ? exponential<T>(logit - lse[row]) : 0.0f;
            stripe[row * kWeightPitch<T> + column] = rounded<T>(weight * (d_weights[0][i] - delta[row]));
        }
    }
    __syncwarp();
    add_product<Order::Rows, Order::Rows>(d_q, stripe, kWeightPitch<T>, k, kRow, kColumns / 16);
    __syncwarp();
}

template <typename T, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) table_attention_query_gradient(const TableAttention a) {
    using Shape = TableShape<T, D, WARPS>;
    DIG_DYNAMIC_SHARED(memory);
    const Packed& packed = a.base.packed;
    const TableBlock block = table_block<Shape>(packed);
    if (block.first_row >= block.sample.length) return;
    Arena arena{memory};
    const QueryShared<T, D, WARPS> shared(arena, a.n_knots);
    const TileIndex<T> index = tile_index<T>(shared.stripes);
    float* places = shared.places + warp_id() * kStripeFloats;
    T* stripe = reinterpret_cast<T*>(shared.stripes + warp_id() * kStripeFloats);
    const int own = 16 * warp_id(), first_row = block.first_row + own;
    load_knots(shared.knots, a, block);
    load_group<T, D>(shared.resident[0], a.base.q, block, block.first_row, Shape::kRows, packed.width);
    load_group<T, D>(shared.resident[1], a.base.d_out, block, block.first_row, Shape::kRows, packed.width);
    load_query_rows<T, Shape::kRows>(shared.rows, a.base, block, Shape::kHeads);

    Tile<T> d_q[Shape::kHeads][D / 16];
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) clear(d_q[g]);
    for (int first = 0; first < block.sample.length; first += kColumns) {
        __syncthreads();
        load_group<T, D>(shared.streamed[0], a.base.k, block, first, kColumns, packed.width);
        load_group<T, D>(shared.streamed[1], a.base.v, block, first, kColumns, packed.width);
        __syncthreads();
        const uint32_t on = keys_on(packed, block.sample, first);
        fill_places<Rows::Queries>(a, block.sample, first_row, first, places);
#pragma unroll
        for (int g = 0; g < Shape::kHeads; ++g) {
            if (g >= block.heads) break;
            const auto bias = table_bias<Rows::Queries>(a, block, places, shared.knots, g, first_row, first);
            const int row = g * Shape::kRows + own, column = g * kColumns * Shape::kRow;
            add_query_gradient<T, D>(shared.resident[0] + row * Shape::kRow, shared.resident[1] + row * Shape::kRow,
                                     shared.streamed[0] + column, shared.streamed[1] + column, stripe,
                                     shared.rows + row, shared.rows + Shape::kHeads * Shape::kRows + row, on,
                                     a.base.scale, bias, index, d_q[g]);
        }
    }
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) {
        if (g < block.heads)
            store_rows(a.base.d_q, block.sample, first_row, block.first_head + g, packed.width, index, d_q[g],
                       [&](int) { return a.base.scale; });
    }
}

// d_k += dS^T Q and d_v += P^T dO for the warp's 16 keys and 32 queries.
template <typename T, int D, typename Bias>
__device__ void add_key_gradients(const T* k, const T* v, const T* q, const T* d_out, T* stripe, const float* lse,
                                  const float* delta, uint32_t on, float scale, const Bias& bias,
                                  const TileIndex<T>& index, Tile<T> (&d_k)[D / 16], Tile<T> (&d_v)[D / 16]) {
    constexpr int kRow = kPitch<T, D>;
    T* d_logits = stripe + 16 * kWeightPitch<T>;
#pragma unroll 1
    for (int t = 0; t < kColumns / 16; ++t) {
        Tile<T> logits[1], d_weights[1];
        clear(logits);
        clear(d_weights);
        add_product<Order::Rows, Order::Columns>(logits, k, kRow, q + 16 * t * kRow, kRow, D / 16);
        add_product<Order::Rows, Order::Columns>(d_weights, v, kRow, d_out + 16 * t * kRow, kRow, D / 16);
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) {
            const int row = index.row(i), column = 16 * t + index.column(i);
            const float logit = scale * logits[0][i] + bias.at(row, column);
            const float weight = on >> row & 1 ? exponential<T>(logit - lse[column]) : 0.0f;
            stripe[row * kWeightPitch<T> + column] = rounded<T>(weight);
            d_logits[row * kWeightPitch<T> + column] = rounded<T>(weight * (d_weights[0][i] - delta[column]));
        }
    }
    __syncwarp();
    add_product<Order::Rows, Order::Rows>(d_v, stripe, kWeightPitch<T>, d_out, kRow, kColumns / 16);
    add_product<Order::Rows, Order::Rows>(d_k, d_logits, kWeightPitch<T>, q, kRow, kColumns / 16);
    __syncwarp();
}

template <typename T, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) table_attention_key_gradient(const TableAttention a) {
    using Shape = TableShape<T, D, WARPS>;
    DIG_DYNAMIC_SHARED(memory);
    const Packed& packed = a.base.packed;
    const TableBlock block = table_block<Shape>(packed);
    if (block.first_row >= block.sample.length) return;
    Arena arena{memory};
    const KeyShared<T, D, WARPS> shared(arena, a.n_knots);
    const TileIndex<T> index = tile_index<T>(shared.stripes);
    float* places = shared.places + warp_id() * kStripeFloats;
    T* stripe = reinterpret_cast<T*>(shared.stripes + warp_id() * 2 * kStripeFloats);
    const int own = 16 * warp_id(), first_row = block.first_row + own;
    load_knots(shared.knots, a, block);
    load_group<T, D>(shared.resident[0], a.base.k, block, block.first_row, Shape::kRows, packed.width);
    load_group<T, D>(shared.resident[1], a.base.v, block, block.first_row, Shape::kRows, packed.width);
    const uint32_t on = keys_on(packed, block.sample, first_row);

    Tile<T> d_k[Shape::kHeads][D / 16], d_v[Shape::kHeads][D / 16];
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) {
        clear(d_k[g]);
        clear(d_v[g]);
    }
    for (int first = 0; first < block.sample.length; first += kColumns) {
        __syncthreads();
        load_group<T, D>(shared.streamed[0], a.base.q, block, first, kColumns, packed.width);
        load_group<T, D>(shared.streamed[1], a.base.d_out, block, first, kColumns, packed.width);
        load_query_columns(shared.columns, a.base, block, first, Shape::kHeads);
        __syncthreads();
        fill_places<Rows::Keys>(a, block.sample, first_row, first, places);
#pragma unroll
        for (int g = 0; g < Shape::kHeads; ++g) {
            if (g >= block.heads) break;
            const auto bias = table_bias<Rows::Keys>(a, block, places, shared.knots, g, first_row, first);
            const int row = (g * Shape::kRows + own) * Shape::kRow, column = g * kColumns;
            add_key_gradients<T, D>(shared.resident[0] + row, shared.resident[1] + row,
                                    shared.streamed[0] + column * Shape::kRow, shared.streamed[1] + column * Shape::kRow,
                                    stripe, shared.columns + column, shared.columns + Shape::kHeads * kColumns + column,
                                    on, a.base.scale, bias, index, d_k[g], d_v[g]);
        }
    }
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) {
        if (g >= block.heads) break;
        const int head = block.first_head + g;
        store_rows(a.base.d_k, block.sample, first_row, head, packed.width, index, d_k[g], [&](int) { return a.base.scale; });
        store_rows(a.base.d_v, block.sample, first_row, head, packed.width, index, d_v[g], [](int) { return 1.0f; });
    }
}

}  // namespace dig
