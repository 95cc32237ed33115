// Reading and writing packed batches: samples, rows of site tensors, elements of pair blocks.
#pragma once

#include "arguments.hpp"
#include "warp_tile.cuh"

namespace dig {

constexpr int kColumns = 32;  // one column per lane of a warp

struct Sample {
    int64_t begin;  // first site
    int length;
    int64_t pair_offset;
    int64_t static_offset;
};

__device__ inline Sample sample_at(const Packed& packed, int b) {
    const int begin = packed.cu_seqlens[b];
    const int64_t fixed = packed.static_offsets ? packed.static_offsets[packed.system[b]] : 0;
    return {begin, packed.cu_seqlens[b + 1] - begin, packed.pair_offsets[b], fixed};
}

// Bit c is set where site first + c of the sample is a key that takes part. Called by a whole warp.
__device__ inline uint32_t keys_on(const Packed& packed, const Sample& sample, int first) {
    const int key = first + lane_id();
    const bool here = key < sample.length;
    return __ballot_sync(kAllLanes, here && (!packed.key_mask || packed.key_mask[sample.begin + key]));
}

// Elements from one row of a [rows, D] tile in shared memory to the next; 16 bytes more than D spread rows over the banks.
template <typename T, int D> constexpr int kPitch = D + 16 / static_cast<int>(sizeof(T));

template <typename T> __device__ inline const T* row_of(const SiteTensor& tensor, int64_t site, int head) {
    return static_cast<const T*>(tensor.data) + site * tensor.site_stride + head * tensor.head_stride;
}

template <typename T> __device__ inline bool in_words_of_16_bytes(const SiteTensor& tensor, int width) {
    const uint64_t bytes = sizeof(T) * (tensor.site_stride | tensor.head_stride | width);
    return ((reinterpret_cast<uint64_t>(tensor.data) | bytes) & 15) == 0;
}

// tile[r][:] = sites first + r of the sample for r < rows, 0 beyond the sample and beyond `width`. Called by the block.
template <typename T, int D>
__device__ void load_rows(T* tile, const SiteTensor& from, const Sample& sample, int first, int rows, int head, int width) {
    if (in_words_of_16_bytes<T>(from, width)) {
        constexpr int kWord = 16 / sizeof(T), kWords = D / kWord;
        for (int e = threadIdx.x; e < rows * kWords; e += blockDim.x) {
            const int row = e / kWords, column = e % kWords * kWord;
            uint4 word = {0, 0, 0, 0};
            if (first + row < sample.length && column < width)
                word = *reinterpret_cast<const uint4*>(row_of<T>(from, sample.begin + first + row, head) + column);
            *reinterpret_cast<uint4*>(tile + row * kPitch<T, D> + column) = word;
        }
        return;
    }
    for (int e = threadIdx.x; e < rows * D; e += blockDim.x) {
        const int row = e / D, column = e % D;
        const bool here = first + row < sample.length && column < width;
        tile[row * kPitch<T, D> + column] =
            here ? row_of<T>(from, sample.begin + first + row, head)[column] : rounded<T>(0.0f);
    }
}

// Sites first .. first + 15 of the sample take factor(row) * tiles, as far as the sample and `width` reach.
template <typename T, int N, typename Factor>
__device__ void store_rows(const SiteTensor& to, const Sample& sample, int first, int head, int width,
                           const TileIndex<T>& index, Tile<T> (&tiles)[N], Factor factor) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < kTileElements; ++i) {
            const int row = index.row(i), column = 16 * n + index.column(i);
            if (first + row < sample.length && column < width)
                const_cast<T*>(row_of<T>(to, sample.begin + first + row, head))[column] =
                    rounded<T>(factor(row) * tiles[n][i]);
        }
    }
}

// d_out_i . out_i of one site and head.
template <typename T> __device__ float delta_of(const Attention& a, int64_t site, int head) {
    const T* d_out = row_of<T>(a.d_out, site, head);
    const T* out = row_of<T>(a.out, site, head);
    float sum = 0.0f;
    for (int c = 0; c < a.packed.width; ++c) sum += widened(d_out[c]) * widened(out[c]);
    return sum;
}

// The [L, pitch] block of one sample (or system) and head in a flat pair tensor; an absent tensor reads as 0.
struct PairBlock {
    void* data;
    bool is_bf16;
    int length;
    int pitch;

    __device__ float at(int i, int j) const {
        if (!data || i >= length || j >= length) return 0.0f;
        const int64_t e = static_cast<int64_t>(i) * pitch + j;
        return is_bf16 ? widened(static_cast<const bf16*>(data)[e]) : static_cast<const float*>(data)[e];
    }

    // Elements j .. j + 3 of row i, j a multiple of 4; anything where j + c is beyond the sample.
    __device__ float4 four(int i, int j) const {
        if (!data || i >= length || j >= pitch) return {0.0f, 0.0f, 0.0f, 0.0f};
        const int64_t e = static_cast<int64_t>(i) * pitch + j;
        if (!is_bf16) return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + e);
        const uint2 word = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(data) + e);
        return {__uint_as_float(word.x << 16), __uint_as_float(word.x & 0xffff0000u), __uint_as_float(word.y << 16),
                __uint_as_float(word.y & 0xffff0000u)};
    }

    // Row padding is written too, so that the whole of a gradient is defined.
    __device__ void set(int i, int j, float value) const {
        if (!data || i >= length || j >= pitch) return;
        const int64_t e = static_cast<int64_t>(i) * pitch + j;
        if (is_bf16)
            static_cast<bf16*>(data)[e] = rounded<bf16>(value);
        else
            static_cast<float*>(data)[e] = value;
    }
};

__device__ inline PairBlock block_of(const PairTensor& tensor, int64_t offset, int heads, int head, int length) {
    const int pitch = (length + 7) / 8 * 8;
    const int64_t start = heads * offset + static_cast<int64_t>(head) * length * pitch;
    const int64_t bytes = start * (tensor.dtype == kBFloat16 ? 2 : 4);
    return {tensor.data ? static_cast<char*>(tensor.data) + bytes : nullptr, tensor.dtype == kBFloat16, length, pitch};
}

}  // namespace dig
