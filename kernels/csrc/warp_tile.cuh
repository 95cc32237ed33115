// 16 x 16 tiles of fp32 sums, each held by one warp, and products of shared-memory matrices added to them.
//
// bf16 operands go through the tensor cores (wmma 16x16x16), fp32 operands through plain FMA. Which element of a tile a
// lane holds is not promised by wmma; TileIndex finds it out by loading a tile of serial numbers, so that the kernels
// may work on sums in registers with known row and column. Operands start at multiples of 32 bytes and their pitch is a
// multiple of 16 bytes.
#pragma once

#include "platform.cuh"

namespace dig {

enum class Order { Rows, Columns };  // element (r, c) stands at r * pitch + c, or at c * pitch + r

constexpr int kTileElements = 8;  // per lane

template <Order O> struct WmmaLayout { using type = nvcuda::wmma::row_major; };
template <> struct WmmaLayout<Order::Columns> { using type = nvcuda::wmma::col_major; };

template <typename T> struct Tile;

template <> struct Tile<bf16> {
    using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
    Sums sums;

    __device__ float& operator[](int i) { return sums.x[i]; }
    __device__ void clear() { nvcuda::wmma::fill_fragment(sums, 0.0f); }
    __device__ void store(float* to, int pitch) const {
        nvcuda::wmma::store_matrix_sync(to, sums, pitch, nvcuda::wmma::mem_row_major);
    }

    template <Order A, Order B, int N>
    static __device__ void add_product(Tile (&c)[N], const bf16* a, int pitch_a, const bf16* b, int pitch_b, int steps) {
        using namespace nvcuda;
        wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, typename WmmaLayout<A>::type> left;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, typename WmmaLayout<B>::type> right;
#pragma unroll(N >= 4 ? 1 : 2)
        for (int k = 0; k < steps; ++k) {
            wmma::load_matrix_sync(left, a + 16 * k * (A == Order::Rows ? 1 : pitch_a), pitch_a);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const bf16* from = B == Order::Rows ? b + 16 * k * pitch_b + 16 * n : b + 16 * n * pitch_b + 16 * k;
                wmma::load_matrix_sync(right, from, pitch_b);
                wmma::mma_sync(c[n].sums, left, right, c[n].sums);
            }
        }
    }
};

template <> struct Tile<float> {
    float sums[kTileElements];  // row lane / 2, eight columns from 8 * (lane % 2)

    __device__ float& operator[](int i) { return sums[i]; }
    __device__ void clear() {
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
    }
    __device__ void store(float* to, int pitch) const {
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) to[lane_id() / 2 * pitch + 8 * (lane_id() % 2) + i] = sums[i];
    }

    template <Order A, Order B, int N>
    static __device__ void add_product(Tile (&c)[N], const float* a, int pitch_a, const float* b, int pitch_b, int steps) {
        const int row = lane_id() / 2, column = 8 * (lane_id() % 2);
#pragma unroll 2
        for (int k = 0; k < 16 * steps; ++k) {
            const float left = A == Order::Rows ? a[row * pitch_a + k] : a[k * pitch_a + row];
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < kTileElements; ++i) {
                    const int at = 16 * n + column + i;
                    c[n].sums[i] += left * (B == Order::Rows ? b[k * pitch_b + at] : b[at * pitch_b + k]);
                }
            }
        }
    }
};

// c[n] += A B for the 16 rows of A and 16 N columns of B, over 16 * steps terms.
template <Order A, Order B, typename T, int N>
__device__ inline void add_product(Tile<T> (&c)[N], const T* a, int pitch_a, const T* b, int pitch_b, int steps) {
    Tile<T>::template add_product<A, B, N>(c, a, pitch_a, b, pitch_b, steps);
}

template <typename T, int N> __device__ inline void clear(Tile<T> (&tiles)[N]) {
#pragma unroll
    for (Tile<T>& tile : tiles) tile.clear();
}

// Row and column of the i-th element that this lane holds of any tile.
template <typename T> struct TileIndex {
    uint32_t packed[kTileElements / 4];

    __device__ int code(int i) const { return packed[i / 4] >> (8 * (i % 4)) & 255; }
    __device__ int row(int i) const { return code(i) / 16; }
    __device__ int column(int i) const { return code(i) % 16; }
};

__device__ inline void load_serials(Tile<bf16>& tile, const float* serials) {
    static_assert(Tile<bf16>::Sums::num_elements == kTileElements, "a lane holds eight sums of a tile");
    nvcuda::wmma::load_matrix_sync(tile.sums, serials, 16, nvcuda::wmma::mem_row_major);
}

__device__ inline void load_serials(Tile<float>& tile, const float* serials) {
    for (int i = 0; i < kTileElements; ++i) tile[i] = serials[lane_id() / 2 * 16 + 8 * (lane_id() % 2) + i];
}

// Called by the whole block; `scratch` (256 floats of shared memory) is free again on return.
template <typename T> __device__ inline TileIndex<T> tile_index(float* scratch) {
    for (int e = threadIdx.x; e < 256; e += blockDim.x) scratch[e] = static_cast<float>(e);
    __syncthreads();
    Tile<T> serials;
    load_serials(serials, scratch);
    __syncthreads();
    TileIndex<T> index{};
#pragma unroll
    for (int i = 0; i < kTileElements; ++i) index.packed[i / 4] |= static_cast<uint32_t>(serials[i]) << (8 * (i % 4));
    return index;
}

}  // namespace dig
