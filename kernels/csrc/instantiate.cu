// Every kernel that ships, instantiated by launching it: {bf16, fp32} x {d <= 32, d <= 64}. No torch header is needed, so
// this file alone shows what ptxas makes of the kernels.
#include <stdexcept>
#include <string>

#include "launchers.hpp"
#include "small_block_attention.cuh"
#include "table_attention_backward.cuh"

namespace dig {
namespace {

constexpr int kTableWarps = 4;

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

int shared_memory_limit() {
    int device = 0, limit = 0;
    check(cudaGetDevice(&device), "current device");
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of the device");
    return limit;
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t bytes, const Arguments& a, cudaStream_t stream) {
    const int limit = shared_memory_limit();
    if (bytes > static_cast<size_t>(limit))
        throw std::invalid_argument("the kernel needs " + std::to_string(bytes) + " bytes of shared memory, the device has " +
                                    std::to_string(limit) + ": use fewer knots or shorter samples, or dig_kernels.attention");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "dynamic shared memory");
    kernel<<<grid, threads, bytes, stream>>>(a);
    check(cudaGetLastError(), "kernel launch");
}

bool nothing_to_do(const Packed& packed) { return packed.batch == 0 || packed.max_length == 0 || packed.heads == 0; }

template <typename Shape> dim3 table_grid(const Packed& packed) {
    const unsigned tiles = (packed.max_length + Shape::kRows - 1) / Shape::kRows;
    return dim3(packed.batch * tiles, (packed.heads + Shape::kHeads - 1) / Shape::kHeads);
}

template <typename T, int D> struct Table {
    using Shape = TableShape<T, D, kTableWarps>;

    static void forward(const TableAttention& a, cudaStream_t stream) {
        launch(dig::table_attention_forward<T, D, kTableWarps>, table_grid<Shape>(a.base.packed), 32 * kTableWarps,
               ForwardShared<T, D, kTableWarps>::bytes(a.n_knots), a, stream);
    }

    static void backward(const TableAttention& a, cudaStream_t stream) {
        launch(table_attention_query_gradient<T, D, kTableWarps>, table_grid<Shape>(a.base.packed), 32 * kTableWarps,
               QueryShared<T, D, kTableWarps>::bytes(a.n_knots), a, stream);
        launch(table_attention_key_gradient<T, D, kTableWarps>, table_grid<Shape>(a.base.packed), 32 * kTableWarps,
               KeyShared<T, D, kTableWarps>::bytes(a.n_knots), a, stream);
    }
};

template <typename T, int D> struct SmallBlock {
    static int warps(const Packed& packed) { return min(kSmallThreads / 32, multiple(16, packed.max_length) / 16); }

    static void forward(const SmallBlockAttention& a, cudaStream_t stream) {
        const Packed& packed = a.base.packed;
        launch(dig::small_block_forward<T, D>, dim3(packed.batch * packed.heads), 32 * warps(packed),
               small_forward_bytes<T, D>(packed.max_length, warps(packed)), a, stream);
    }

    static void backward(const SmallBlockAttention& a, cudaStream_t stream) {
        const Packed& packed = a.base.packed;
        launch(dig::small_block_backward<T, D>, dim3(packed.batch * packed.heads), 32 * warps(packed),
               small_backward_bytes<T, D>(packed.max_length), a, stream);
    }
};

// Op<T, D> of the smallest padded width that holds d, called through `run`.
template <template <typename, int> class Op, typename Run> void select(const Attention& a, Run run) {
    if (nothing_to_do(a.packed)) return;
    const bool narrow = a.packed.width <= 32;
    if (a.dtype == kBFloat16) return narrow ? run(Op<bf16, 32>{}) : run(Op<bf16, 64>{});
#ifndef DIG_BF16_ONLY  // half the work, where only the tensor-core kernels are to be looked at
    narrow ? run(Op<float, 32>{}) : run(Op<float, 64>{});
#endif
}

}  // namespace

void table_attention_forward(const TableAttention& a, cudaStream_t stream) {
    select<Table>(a.base, [&](auto op) { op.forward(a, stream); });
}

void table_attention_backward(const TableAttention& a, cudaStream_t stream) {
    select<Table>(a.base, [&](auto op) { op.backward(a, stream); });
}

void small_block_forward(const SmallBlockAttention& a, cudaStream_t stream) {
    select<SmallBlock>(a.base, [&](auto op) { op.forward(a, stream); });
}

void small_block_backward(const SmallBlockAttention& a, cudaStream_t stream) {
    select<SmallBlock>(a.base, [&](auto op) { op.backward(a, stream); });
}

}  // namespace dig
