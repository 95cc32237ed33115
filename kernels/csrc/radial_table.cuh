// The tabulated bias: one number per pair (its place on the knots), shared by all heads, and a cubic Hermite lookup of
// (value, step * slope) knots in shared memory for each head.
#pragma once

#include "stripe.cuh"

namespace dig {

enum class Rows { Queries, Keys };  // what the rows of a warp's stripe are; the columns are the others

struct Site {
    float x, y, z;
    int type;
};

__device__ inline Site site_at(const TableAttention& a, int64_t site) {
    if (a.u) return {};
    const float* position = a.positions + 3 * site;
    return {position[0], position[1], position[2], a.types[site]};
}

__device__ inline float pair_scalar(const TableAttention& a, const Site& query, const Site& key) {
    const float x = query.x - key.x, y = query.y - key.y, z = query.z - key.z;
    const int pair = query.type * a.n_types + key.type;
    return a.gain[pair] * sqrtf(x * x + y * y + z * z) + a.shift[pair];
}

// places[r][c] of the warp's stripe: where u of row first_row + r and column first_column + c lies on the knots, in
// [0, K - 1], or NaN where u is. Beyond the sample the last site stands in. The lane of a column keeps that column's site
// in registers.
template <Rows R>
__device__ void fill_places(const TableAttention& a, const Sample& sample, int first_row, int first_column, float* places) {
    const int last = sample.length - 1, column = min(first_column + lane_id(), last);
    const int64_t pitch = (sample.length + 7) / 8 * 8;
    const Site own = site_at(a, sample.begin + column);
#pragma unroll 4
    for (int r = 0; r < 16; ++r) {
        const int row = min(first_row + r, last);
        const int64_t query = R == Rows::Queries ? row : column, key = R == Rows::Queries ? column : row;
        float u;
        if (a.u) {
            u = a.u[sample.pair_offset + query * pitch + key];
        } else {
            const Site other = site_at(a, sample.begin + row);
            u = R == Rows::Queries ? pair_scalar(a, other, own) : pair_scalar(a, own, other);
        }
        const float place = (u - a.start) * a.inverse_step;
        const float on_knots = fminf(fmaxf(place, 0.0f), static_cast<float>(a.n_knots - 1));
        places[r * kStripePitch + lane_id()] = place == place ? on_knots : place;
    }
    __syncwarp();
}

__device__ inline float hermite(const float2* knots, int n_knots, float place) {
    const int piece = max(min(static_cast<int>(place), n_knots - 2), 0);  // NaN may become any integer
    const float f = place - static_cast<float>(piece);
    const float2 left = knots[piece], right = knots[piece + 1];
    const float rise = right.x - left.x;
    const float c2 = 3.0f * rise - 2.0f * left.y - right.y, c3 = left.y + right.y - 2.0f * rise;
    return left.x + f * (left.y + f * (c2 + f * c3));
}

// Bias of one head for the pairs of a stripe.
template <Rows R> struct TableBias {
    const float* places;
    const float2* knots;
    int n_knots;
    PairBlock fixed;
    int first_row;
    int first_column;

    __device__ float at(int row, int column) const {
        const int i = R == Rows::Queries ? first_row + row : first_column + column;
        const int j = R == Rows::Queries ? first_column + column : first_row + row;
        return hermite(knots, n_knots, places[row * kStripePitch + column]) + fixed.at(i, j);
    }

    // Columns column .. column + 3 of a stripe of queries.
    __device__ float4 four(int row, int column) const {
        const float4 place = *reinterpret_cast<const float4*>(places + row * kStripePitch + column);
        const float4 added = fixed.four(first_row + row, first_column + column);
        return {hermite(knots, n_knots, place.x) + added.x, hermite(knots, n_knots, place.y) + added.y,
                hermite(knots, n_knots, place.z) + added.z, hermite(knots, n_knots, place.w) + added.w};
    }
};

}  // namespace dig
