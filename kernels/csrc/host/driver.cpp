// The kernels executed on the CPU, behind a C interface for tests: two warps per table block, so that short samples
// already span several blocks. Each function returns a cuda_on_host::Status.
#define DIG_ON_HOST
#include "../platform.cuh"

#include "../small_block_attention.cuh"
#include "../table_attention_backward.cuh"

namespace {

using namespace dig;
using cuda_on_host::launch;

constexpr unsigned kTableWarps = 2, kSmallWarps = 2;

template <typename T, int D> struct Host {
    using Shape = TableShape<T, D, kTableWarps>;

    static dim3 grid(const Packed& packed) {
        const unsigned tiles = (packed.max_length + Shape::kRows - 1) / Shape::kRows;
        return {packed.batch * tiles, static_cast<unsigned>(packed.heads + Shape::kHeads - 1) / Shape::kHeads, 1};
    }

    static int run(const TableAttention& a, int backward, unsigned seed) {
        const dim3 blocks = grid(a.base.packed);
        const unsigned threads = 32 * kTableWarps;
        if (!backward)
            return launch<table_attention_forward<T, D, kTableWarps>>(
                blocks, threads, ForwardShared<T, D, kTableWarps>::bytes(a.n_knots), a, seed);
        const int status = launch<table_attention_query_gradient<T, D, kTableWarps>>(
            blocks, threads, QueryShared<T, D, kTableWarps>::bytes(a.n_knots), a, seed);
        return status ? status
                      : launch<table_attention_key_gradient<T, D, kTableWarps>>(
                            blocks, threads, KeyShared<T, D, kTableWarps>::bytes(a.n_knots), a, seed);
    }

    static int run(const SmallBlockAttention& a, int backward, unsigned seed) {
        const Packed& packed = a.base.packed;
        const dim3 blocks{static_cast<unsigned>(packed.batch * packed.heads), 1, 1};
        if (!backward)
            return launch<small_block_forward<T, D>>(blocks, 32 * kSmallWarps,
                                                     small_forward_bytes<T, D>(packed.max_length, kSmallWarps), a, seed);
        return launch<small_block_backward<T, D>>(blocks, 32 * kSmallWarps, small_backward_bytes<T, D>(packed.max_length), a, seed);
    }
};

template <typename T> size_t backward_bytes(int length, int width) {
    return width <= 32 ? small_backward_bytes<T, 32>(length) : small_backward_bytes<T, 64>(length);
}

template <typename Arguments> int run(const Arguments& a, int backward, unsigned seed) {
    const Packed& packed = a.base.packed;
    if (packed.batch == 0 || packed.max_length == 0) return cuda_on_host::kDone;
#ifdef DIG_NARROW_FP32_ONLY  // builds in a third of the time
    return packed.width <= 32 && a.base.dtype == kFloat32 ? Host<float, 32>::run(a, backward, seed) : cuda_on_host::kUnsupported;
#else
    if (packed.width > 64) return cuda_on_host::kUnsupported;
    if (a.base.dtype == kBFloat16)
        return packed.width <= 32 ? Host<bf16, 32>::run(a, backward, seed) : Host<bf16, 64>::run(a, backward, seed);
    return packed.width <= 32 ? Host<float, 32>::run(a, backward, seed) : Host<float, 64>::run(a, backward, seed);
#endif
}

}  // namespace

extern "C" int dig_table_attention(const TableAttention* a, int backward, unsigned seed) { return run(*a, backward, seed); }

extern "C" size_t dig_small_backward_bytes(int length, int width, int dtype) {
    return dtype == kBFloat16 ? backward_bytes<bf16>(length, width) : backward_bytes<float>(length, width);
}

extern "C" int dig_small_block_attention(const SmallBlockAttention* a, int backward, unsigned seed) {
    return run(*a, backward, seed);
}
