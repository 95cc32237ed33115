// The ground under the kernels: CUDA's headers, or host/cuda_on_host.hpp when g++ compiles the same sources for a test.
#pragma once

#ifdef DIG_ON_HOST
#include "host/cuda_on_host.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>
#define DIG_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include <cstddef>
#include <cstdint>

namespace dig {

using bf16 = __nv_bfloat16;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kMasked = -1e30f;  // log-sum-exp of a row without keys, as in reference.py

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

template <typename T> __device__ inline T rounded(float value);
template <> __device__ inline float rounded<float>(float value) { return value; }
template <> __device__ inline bf16 rounded<bf16>(float value) { return __float2bfloat16(value); }

__device__ inline float widened(float value) { return value; }
__device__ inline float widened(bf16 value) { return __bfloat162float(value); }

// exp in the accuracy that the type of the inputs deserves
template <typename T> __device__ inline float exponential(float x);
template <> __device__ inline float exponential<float>(float x) { return expf(x); }
template <> __device__ inline float exponential<bf16>(float x) { return __expf(x); }

// Shared memory is dealt out by the same code that counts its bytes on the host (base == nullptr there).
struct Arena {
    unsigned char* base;
    size_t used = 0;

    template <typename U> __host__ __device__ U* take(size_t count) {
        U* start = reinterpret_cast<U*>(base + used);
        used += (count * sizeof(U) + 127) / 128 * 128;
        return start;
    }
};

}  // namespace dig
