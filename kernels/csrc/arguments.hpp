// What the kernels are told: plain structures, the same for the launchers, the torch binding and the host tests.
//
// The layout is that of dig_kernels/layout.py: T sites of B samples end to end, site tensors [T, H, d] with a contiguous
// last axis and free other strides, pair tensors flat with a block [H, L, pitch] per sample (or per system), pitch = L
// rounded up to 8 elements. Strides and offsets are in elements. A null data pointer means "absent".
#pragma once

#include <cstdint>

namespace dig {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct SiteTensor {
    void* data;
    int64_t site_stride;
    int64_t head_stride;
};

struct PairTensor {
    void* data;
    int32_t dtype;
    int32_t reserved;
};

struct Packed {
    const int32_t* cu_seqlens;      // [B + 1]
    const int64_t* pair_offsets;    // [B + 1], of one channel
    const int32_t* system;          // [B]
    const int64_t* static_offsets;  // [G + 1], of one channel
    const uint8_t* key_mask;        // [T], 0 where a key takes no part
    int64_t sites;                  // T
    int32_t batch;
    int32_t max_length;
    int32_t heads;
    int32_t width;  // d
};

struct Attention {
    Packed packed;
    SiteTensor q, k, v, out;
    SiteTensor d_out, d_q, d_k, d_v;  // backward passes only
    float* lse;                       // [H, T]
    float* delta;                     // [H, T], written by the query pass and read by the key pass
    float scale;
    int32_t dtype;  // of every site tensor
};

// The bias is bias[h, i, j] = table_h(u_ij) + fixed[h, i, j]; u is given, or gain[ti, tj] |x_i - x_j| + shift[ti, tj].
struct TableAttention {
    Attention base;
    const float* knots;      // [H, K, 2]: value and step * slope
    const float* u;          // flat [pairs], or null
    const float* positions;  // [T, 3] where u is null, likewise the three below
    const int32_t* types;    // [T]
    const float* gain;       // [n, n]
    const float* shift;      // [n, n]
    PairTensor fixed;        // flat over systems
    int32_t n_types;
    int32_t n_knots;  // K >= 2
    float start;
    float inverse_step;
};

struct SmallBlockAttention {
    Attention base;
    PairTensor bias;    // flat over samples
    PairTensor d_bias;  // backward only
};

}  // namespace dig
