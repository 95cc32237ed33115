// The kernels as plain host functions, for the torch binding. They validate nothing that the binding has checked; they
// throw std::invalid_argument where a device has too little shared memory and std::runtime_error where a launch fails.
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.hpp"

namespace dig {

void table_attention_forward(const TableAttention& a, cudaStream_t stream);
void table_attention_backward(const TableAttention& a, cudaStream_t stream);
void small_block_forward(const SmallBlockAttention& a, cudaStream_t stream);
void small_block_backward(const SmallBlockAttention& a, cudaStream_t stream);

}  // namespace dig
