// torch.ops.dig_kernels_cuda on CUDA tensors. The schemas, shapes for tracing and gradients are declared in
// dig_kernels/cuda_extension.py, which also checks what a user passes; here tensors become the structures of arguments.hpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "launchers.hpp"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T> T* data_of(const MaybeTensor& tensor) {
    if (!tensor) return nullptr;
    TORCH_CHECK(tensor->is_cuda() && tensor->is_contiguous(), "expected a contiguous CUDA tensor, found ", tensor->toString());
    return static_cast<T*>(tensor->data_ptr());
}

int32_t dtype_of(const Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, "expected float32 or bfloat16, found ",
                tensor.scalar_type());
    return tensor.scalar_type() == at::kFloat ? dig::kFloat32 : dig::kBFloat16;
}

Tensor with_contiguous_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

Tensor empty_sites(const Tensor& like) { return at::empty(like.sizes(), like.options()); }

dig::SiteTensor sites_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

dig::PairTensor pairs_of(const MaybeTensor& tensor) {
    if (!tensor) return {nullptr, dig::kFloat32, 0};
    void* data = data_of<void>(tensor);
    TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a pair tensor must start at a multiple of 16 bytes");
    return {data, dtype_of(*tensor), 0};
}

// q, k and v must outlive the launch: they are those of the caller, already with contiguous rows.
dig::Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_mask, const Tensor& cu_seqlens,
                         const Tensor& pair_offsets, int64_t max_length, double scale) {
    dig::Attention a{};
    a.packed.cu_seqlens = data_of<int32_t>(cu_seqlens);
    a.packed.pair_offsets = data_of<int64_t>(pair_offsets);
    a.packed.key_mask = data_of<uint8_t>(key_mask);
    a.packed.sites = q.size(0);
    a.packed.batch = static_cast<int32_t>(cu_seqlens.size(0) - 1);
    a.packed.max_length = static_cast<int32_t>(max_length);
    a.packed.heads = static_cast<int32_t>(q.size(1));
    a.packed.width = static_cast<int32_t>(q.size(2));
    a.q = sites_of(q);
    a.k = sites_of(k);
    a.v = sites_of(v);
    a.scale = static_cast<float>(scale);
    a.dtype = dtype_of(q);
    return a;
}

void set_outputs(dig::Attention& a, const Tensor& out, const Tensor& lse) {
    a.out = sites_of(out);
    a.lse = static_cast<float*>(lse.data_ptr());
}

void set_gradients(dig::Attention& a, const Tensor& d_out, const Tensor& d_q, const Tensor& d_k, const Tensor& d_v) {
    a.d_out = sites_of(d_out);
    a.d_q = sites_of(d_q);
    a.d_k = sites_of(d_k);
    a.d_v = sites_of(d_v);
}

Tensor empty_row_statistic(const Tensor& q) { return at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat)); }

// The bias of table_attention as torch passes it.
struct Table {
    const Tensor& knots;
    const MaybeTensor &u, &positions, &types, &gain, &shift, &fixed;
    const Tensor &system, &static_offsets;
    double start, step;

    dig::TableAttention arguments(const dig::Attention& base) const {
        dig::TableAttention a{};
        a.base = base;
        a.base.packed.system = data_of<int32_t>(system);
        a.base.packed.static_offsets = data_of<int64_t>(static_offsets);
        a.knots = data_of<float>(knots);
        a.u = data_of<float>(u);
        a.positions = data_of<float>(positions);
        a.types = data_of<int32_t>(types);
        a.gain = data_of<float>(gain);
        a.shift = data_of<float>(shift);
        a.fixed = pairs_of(fixed);
        a.n_types = gain ? static_cast<int32_t>(gain->size(0)) : 0;
        a.n_knots = static_cast<int32_t>(knots.size(1));
        a.start = static_cast<float>(start);
        a.inverse_step = static_cast<float>(1.0 / step);
        return a;
    }
};

std::tuple<Tensor, Tensor> table_attention(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& knots, const MaybeTensor& u, const MaybeTensor& positions,
    const MaybeTensor& types, const MaybeTensor& gain, const MaybeTensor& shift, const MaybeTensor& fixed, const MaybeTensor& key_mask,
    const Tensor& cu_seqlens, const Tensor& pair_offsets, const Tensor& system, const Tensor& static_offsets, int64_t max_length,
    double scale, double start, double step) {
    const c10::cuda::CUDAGuard device(q_.device());
    const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
    const Tensor out = empty_sites(q), lse = empty_row_statistic(q);
    const Table table{knots, u, positions, types, gain, shift, fixed, system, static_offsets, start, step};
    dig::TableAttention a = table.arguments(attention(q, k, v, key_mask, cu_seqlens, pair_offsets, max_length, scale));
    set_outputs(a.base, out, lse);
    dig::table_attention_forward(a, c10::cuda::getCurrentCUDAStream());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> table_attention_backward(
    const Tensor& d_out_, const Tensor& out, const Tensor& lse, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& knots, const MaybeTensor& u, const MaybeTensor& positions, const MaybeTensor& types, const MaybeTensor& gain,
    const MaybeTensor& shift, const MaybeTensor& fixed, const MaybeTensor& key_mask, const Tensor& cu_seqlens,
    const Tensor& pair_offsets, const Tensor& system, const Tensor& static_offsets, int64_t max_length, double scale, double start,
    double step) {
    const c10::cuda::CUDAGuard device(q_.device());
    const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
    const Tensor d_out = with_contiguous_rows(d_out_), delta = at::empty_like(lse);
    const Tensor d_q = empty_sites(q), d_k = empty_sites(q), d_v = empty_sites(q);
    const Table table{knots, u, positions, types, gain, shift, fixed, system, static_offsets, start, step};
    dig::TableAttention a = table.arguments(attention(q, k, v, key_mask, cu_seqlens, pair_offsets, max_length, scale));
    set_outputs(a.base, out, lse);
    set_gradients(a.base, d_out, d_q, d_k, d_v);
    a.base.delta = static_cast<float*>(delta.data_ptr());
    dig::table_attention_backward(a, c10::cuda::getCurrentCUDAStream());
    return {d_q, d_k, d_v};
}

std::tuple<Tensor, Tensor> small_block_attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const MaybeTensor& bias,
                                                 const MaybeTensor& key_mask, const Tensor& cu_seqlens, const Tensor& pair_offsets,
                                                 int64_t max_length, double scale) {
    const c10::cuda::CUDAGuard device(q_.device());
    const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
    const Tensor out = empty_sites(q), lse = empty_row_statistic(q);
    dig::SmallBlockAttention a{attention(q, k, v, key_mask, cu_seqlens, pair_offsets, max_length, scale), pairs_of(bias), {}};
    set_outputs(a.base, out, lse);
    dig::small_block_forward(a, c10::cuda::getCurrentCUDAStream());
    return {out, lse};
}

// The last gradient is that of the bias, empty where there is none.
std::tuple<Tensor, Tensor, Tensor, Tensor> small_block_attention_backward(
    const Tensor& d_out_, const Tensor& out, const Tensor& lse, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const MaybeTensor& bias, const MaybeTensor& key_mask, const Tensor& cu_seqlens, const Tensor& pair_offsets, int64_t max_length,
    double scale) {
    const c10::cuda::CUDAGuard device(q_.device());
    const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
    const Tensor d_out = with_contiguous_rows(d_out_);
    const Tensor d_q = empty_sites(q), d_k = empty_sites(q), d_v = empty_sites(q);
    const Tensor d_bias = bias ? at::empty_like(*bias) : at::empty({0}, q.options());
    dig::SmallBlockAttention a{attention(q, k, v, key_mask, cu_seqlens, pair_offsets, max_length, scale), pairs_of(bias),
                               bias ? pairs_of(d_bias) : dig::PairTensor{}};
    set_outputs(a.base, out, lse);
    set_gradients(a.base, d_out, d_q, d_k, d_v);
    dig::small_block_backward(a, c10::cuda::getCurrentCUDAStream());
    return {d_q, d_k, d_v, d_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(dig_kernels_cuda, CUDA, library) {
    library.impl("table_attention", &table_attention);
    library.impl("table_attention_backward", &table_attention_backward);
    library.impl("small_block_attention", &small_block_attention);
    library.impl("small_block_attention_backward", &small_block_attention_backward);
}
