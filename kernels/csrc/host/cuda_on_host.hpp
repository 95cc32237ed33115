// CUDA kernels executed on the CPU: g++ compiles the .cuh sources against this header (-DDIG_ON_HOST).
//
// Every CUDA thread of a block is a fiber; a scheduler runs them in an order drawn anew, from `seed`, after every barrier.
// So a run repeats exactly, and a missing barrier shows as a result that depends on the seed. Shared memory starts as NaN
// and ends in a guarded zone. wmma fragments keep wmma's promises and no more: which element of an accumulator a lane
// holds is scrambled here, and misaligned operands are an error. Knows one block at a time and nothing of speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define DIG_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::block->shared

using std::max;
using std::min;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

enum Status : int { kDone = 0, kUnsupported = 1, kDeadlock = 2, kSharedOverrun = 3, kMisaligned = 4 };
enum class Wait { None, Warp, Block, Finished };

constexpr size_t kStack = 64 * 1024, kGuard = 256;
constexpr unsigned char kPoison = 0xff;  // as float and as bfloat16 a NaN

struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
    Wait wait = Wait::None;
    float exchanged = 0.0f;
    bool voted = false;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    size_t bytes = 0;
    ucontext_t scheduler;
    unsigned current = 0;
    int status = kDone;
    void (*body)(const void*) = nullptr;
    const void* arguments = nullptr;
};

inline Block* block = nullptr;

inline void wait_for(Wait what) {
    Fiber& own = block->fibers[block->current];
    own.wait = what;
    swapcontext(&own.context, &block->scheduler);
}

inline void run_fiber() {
    block->body(block->arguments);
    wait_for(Wait::Finished);
}

// Fibers [begin, end) that all wait at the same barrier (or have finished) go on; whether any did.
inline bool release(unsigned begin, unsigned end, Wait barrier) {
    auto& fibers = block->fibers;
    bool any = false;
    for (unsigned i = begin; i < end; ++i) {
        if (fibers[i].wait != barrier && fibers[i].wait != Wait::Finished) return false;
        any = any || fibers[i].wait == barrier;
    }
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i].wait == barrier) fibers[i].wait = Wait::None;
    return any;
}

inline bool release_all() {
    const unsigned count = block->fibers.size();
    bool any = false;
    for (unsigned w = 0; w < count; w += 32) any = release(w, w + 32, Wait::Warp) || any;
    return release(0, count, Wait::Block) || any;
}

inline void schedule(std::mt19937& random) {
    std::vector<unsigned> order(block->fibers.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    do {
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned i : order) {
            if (block->fibers[i].wait != Wait::None) continue;
            block->current = i;
            threadIdx.x = i;
            swapcontext(&block->scheduler, &block->fibers[i].context);
        }
    } while (release_all());
    for (const Fiber& fiber : block->fibers)
        if (fiber.wait != Wait::Finished) block->status = kDeadlock;
}

inline void start_fibers() {
    for (Fiber& fiber : block->fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        fiber.wait = Wait::None;
        makecontext(&fiber.context, run_fiber, 0);
    }
}

// kernel<<<grid, threads, bytes>>>(arguments), one block after another; a Status.
template <auto Kernel, typename Arguments>
int launch(dim3 grid, unsigned threads, size_t bytes, const Arguments& arguments, unsigned seed) {
    Block state;
    state.fibers = std::vector<Fiber>(threads);
    state.memory.resize(bytes + kGuard + 128);
    state.shared = state.memory.data() + (128 - reinterpret_cast<uintptr_t>(state.memory.data()) % 128) % 128;
    state.bytes = bytes;
    state.body = [](const void* a) { Kernel(*static_cast<const Arguments*>(a)); };
    state.arguments = &arguments;
    block = &state;
    std::mt19937 random(seed);
    gridDim = grid;
    blockDim = dim3{threads, 1, 1};
    for (unsigned i = 0; i < grid.x * grid.y && state.status == kDone; ++i) {
        blockIdx = dim3{i % grid.x, i / grid.x, 0};
        std::memset(state.shared, kPoison, bytes + kGuard);
        start_fibers();
        schedule(random);
        if (std::any_of(state.shared + bytes, state.shared + bytes + kGuard, [](unsigned char c) { return c != kPoison; }))
            state.status = kSharedOverrun;
    }
    block = nullptr;
    return state.status;
}

inline Fiber& lane(unsigned index) { return block->fibers[block->current / 32 * 32 + index]; }

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait_for(cuda_on_host::Wait::Block); }
inline void __syncwarp() { cuda_on_host::wait_for(cuda_on_host::Wait::Warp); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const unsigned own = threadIdx.x % 32;
    cuda_on_host::lane(own).exchanged = value;
    __syncwarp();
    const float other = cuda_on_host::lane(own ^ mask).exchanged;
    __syncwarp();
    return other;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    cuda_on_host::lane(threadIdx.x % 32).voted = vote;
    __syncwarp();
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(cuda_on_host::lane(i).voted) << i;
    __syncwarp();
    return votes;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct __nv_bfloat16 {
    uint16_t bits;
};

// Round to nearest, ties to even; NaN stays NaN.
inline __nv_bfloat16 __float2bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {static_cast<uint16_t>(bits >> 16 | 64)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
// A macro, because glibc's <math.h> already declares a function of this name.
#define __expf(x) std::exp(x)

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

// Operands are held whole by every lane, sums eight per lane.
template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
    static constexpr int num_elements = 256;
    T x[256];
};
template <int M, int N, int K> struct fragment<accumulator, M, N, K, float, void> {
    static constexpr int num_elements = 8;
    float x[8];
};
using Sums = fragment<accumulator, 16, 16, 16, float>;

// A bijection of (lane, i) to the 256 elements that is not that of any GPU.
inline int element(int i) { return (37 * (32 * i + static_cast<int>(threadIdx.x % 32)) + 11) % 256; }

template <typename T> void check_operand(const T* from, unsigned pitch) {
    if (reinterpret_cast<uintptr_t>(from) % 32 || pitch * sizeof(T) % 16) cuda_on_host::block->status = cuda_on_host::kMisaligned;
}

inline void fill_fragment(Sums& c, float value) { std::fill(c.x, c.x + 8, value); }

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch) {
    constexpr bool rows = std::is_same_v<Layout, row_major>;
    check_operand(from, pitch);
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) to.x[16 * r + c] = rows ? from[r * pitch + c] : from[c * pitch + r];
}

inline void load_matrix_sync(Sums& to, const float* from, unsigned pitch, layout_t) {
    check_operand(from, pitch);
    for (int i = 0; i < 8; ++i) to.x[i] = from[element(i) / 16 * pitch + element(i) % 16];
}

inline void store_matrix_sync(float* to, const Sums& from, unsigned pitch, layout_t) {
    check_operand(to, pitch);
    for (int i = 0; i < 8; ++i) to[element(i) / 16 * pitch + element(i) % 16] = from.x[i];
}

template <typename T, typename A, typename B>
void mma_sync(Sums& d, const fragment<matrix_a, 16, 16, 16, T, A>& a, const fragment<matrix_b, 16, 16, 16, T, B>& b,
              const Sums& c) {
    for (int i = 0; i < 8; ++i) {
        const int row = element(i) / 16, column = element(i) % 16;
        float sum = c.x[i];
        for (int k = 0; k < 16; ++k) sum += __bfloat162float(a.x[16 * row + k]) * __bfloat162float(b.x[16 * k + column]);
        d.x[i] = sum;
    }
}

}  // namespace nvcuda::wmma
