// Flash attention whose bias is looked up in a radial table inside the kernel: O(L) memory, forward and backward.
//
// A block owns 16 * WARPS rows of one sample for a group of heads. Each warp computes the pair scalar of its 16 rows and
// 32 streamed columns once; every head of the group then looks its own table up at it. Rows are queries in the forward
// and query passes and keys in the key pass, so no pass needs atomics. The gradient of the table is not made here.
#pragma once

#include "radial_table.cuh"

namespace dig {

template <typename T, int D, int WARPS> struct TableShape {
    static constexpr int kHeads = (sizeof(T) == 2 ? 4 : 2) * 32 / D;  // heads of a group
    static constexpr int kRows = 16 * WARPS;
    static constexpr int kRow = kPitch<T, D>;
};

// RESIDENT row operands stay for the whole block, two column operands stream; STRIPES per warp.
template <typename T, int D, int WARPS, int RESIDENT, int STRIPES> struct TableShared {
    using Shape = TableShape<T, D, WARPS>;
    T* resident[RESIDENT];  // [heads][rows][kRow]
    T* streamed[2];         // [heads][32][kRow]
    float* places;          // [WARPS] stripes
    float* stripes;         // [WARPS][STRIPES] stripes
    float* rows;            // [2][heads][rows]
    float* columns;         // [2][heads][32]
    float2* knots;          // [heads][K]

    __host__ __device__ TableShared(Arena& arena, int n_knots) {
        for (T*& operand : resident) operand = arena.take<T>(Shape::kHeads * Shape::kRows * Shape::kRow);
        for (T*& operand : streamed) operand = arena.take<T>(Shape::kHeads * kColumns * Shape::kRow);
        places = arena.take<float>(WARPS * kStripeFloats);
        stripes = arena.take<float>(WARPS * STRIPES * kStripeFloats);
        rows = arena.take<float>(2 * Shape::kHeads * Shape::kRows);
        columns = arena.take<float>(2 * Shape::kHeads * kColumns);
        knots = arena.take<float2>(static_cast<size_t>(Shape::kHeads) * n_knots);
    }

    static size_t bytes(int n_knots) {
        Arena arena{nullptr};
        TableShared layout(arena, n_knots);
        return arena.used;
    }
};

template <typename T, int D, int WARPS> using ForwardShared = TableShared<T, D, WARPS, 1, 1>;
template <typename T, int D, int WARPS> using QueryShared = TableShared<T, D, WARPS, 2, 1>;
template <typename T, int D, int WARPS> using KeyShared = TableShared<T, D, WARPS, 2, 2>;

// Which rows and heads this block owns: grid (B * row tiles, head groups).
struct TableBlock {
    Sample sample;
    int first_row;
    int first_head;
    int heads;
};

template <typename Shape> __device__ TableBlock table_block(const Packed& packed) {
    const int tiles = (packed.max_length + Shape::kRows - 1) / Shape::kRows;
    const int first_head = blockIdx.y * Shape::kHeads;
    return {sample_at(packed, blockIdx.x / tiles), static_cast<int>(blockIdx.x % tiles) * Shape::kRows, first_head,
            min(Shape::kHeads, packed.heads - first_head)};
}

template <typename T, int D>
__device__ void load_group(T* tiles, const SiteTensor& from, const TableBlock& block, int first, int rows, int width) {
#pragma unroll 1
    for (int g = 0; g < block.heads; ++g)
        load_rows<T, D>(tiles + g * rows * kPitch<T, D>, from, block.sample, first, rows, block.first_head + g, width);
}

__device__ inline void load_knots(float2* to, const TableAttention& a, const TableBlock& block) {
    const float2* from = reinterpret_cast<const float2*>(a.knots) + static_cast<int64_t>(block.first_head) * a.n_knots;
    for (int e = threadIdx.x; e < block.heads * a.n_knots; e += blockDim.x) to[e] = from[e];
}

template <Rows R>
__device__ TableBias<R> table_bias(const TableAttention& a, const TableBlock& block, const float* places,
                                   const float2* knots, int g, int first_row, int first_column) {
    const PairBlock fixed = block_of(a.fixed, block.sample.static_offset, a.base.packed.heads, block.first_head + g,
                                     block.sample.length);
    return {places, knots + g * a.n_knots, a.n_knots, fixed, first_row, first_column};
}

template <typename T, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) table_attention_forward(const TableAttention a) {
    using Shape = TableShape<T, D, WARPS>;
    DIG_DYNAMIC_SHARED(memory);
    const Packed& packed = a.base.packed;
    const TableBlock block = table_block<Shape>(packed);
    if (block.first_row >= block.sample.length) return;
    Arena arena{memory};
    const ForwardShared<T, D, WARPS> shared(arena, a.n_knots);
    const TileIndex<T> index = tile_index<T>(shared.stripes);
    float* places = shared.places + warp_id() * kStripeFloats;
    float* stripe = shared.stripes + warp_id() * kStripeFloats;
    float* rows = shared.rows + warp_id() * 16;
    const int own = 16 * warp_id(), first_row = block.first_row + own;
    load_knots(shared.knots, a, block);
    load_group<T, D>(shared.resident[0], a.base.q, block, block.first_row, Shape::kRows, packed.width);

    Tile<T> out[Shape::kHeads][D / 16];
    RowState state[Shape::kHeads];
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) clear(out[g]);
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
            const T* q = shared.resident[0] + (g * Shape::kRows + own) * Shape::kRow;
            const int column = g * kColumns * Shape::kRow;
            attend<T, D>(q, shared.streamed[0] + column, shared.streamed[1] + column, stripe, rows, on, a.base.scale,
                         bias, index, state[g], out[g]);
        }
    }
#pragma unroll
    for (int g = 0; g < Shape::kHeads; ++g) {
        if (g < block.heads)
            finish_rows(a.base, block.sample, first_row, block.first_head + g, rows, index, state[g], out[g]);
    }
}

}  // namespace dig
