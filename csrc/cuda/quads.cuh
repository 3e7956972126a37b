// What the CUDA ops share: element types, loads and stores of four elements, the loop over quads, the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops.h"

namespace modafill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float &to, float value) { to = value; }
__device__ __forceinline__ void narrow(__nv_bfloat16 &to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(__half &to, float value) { to = __float2half_rn(value); }

template <class T>
struct alignas(4 * sizeof(T)) Pack {
  T values[4];
};

struct Quad {
  float values[4];
};

// Elements of a quad that lie in the row: kWhole where the width and every address are multiples of four elements.
template <class T, bool kWhole>
__device__ __forceinline__ Quad load(const void *base, int64_t offset, int count) {
  const T *const from = static_cast<const T *>(base) + offset;
  Quad quad = {};
  if constexpr (kWhole) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T> *>(from);
    for (int i = 0; i < 4; ++i)
      quad.values[i] = widen(pack.values[i]);
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count)
        quad.values[i] = widen(from[i]);
  }
  return quad;
}

template <class T, bool kWhole>
__device__ __forceinline__ void store(void *base, int64_t offset, int count, const Quad &quad) {
  T *const to = static_cast<T *>(base) + offset;
  if constexpr (kWhole) {
    Pack<T> pack;
    for (int i = 0; i < 4; ++i)
      narrow(pack.values[i], quad.values[i]);
    *reinterpret_cast<Pack<T> *>(to) = pack;
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count)
        narrow(to[i], quad.values[i]);
  }
}

__device__ __forceinline__ Quad quad_normals(const NoiseKey &key, int64_t row, int64_t step, uint32_t draw,
                                             int64_t quad) {
  const Normals n = normals(seed_of(key), row_id_of(key, row), draw_word(step, draw), static_cast<uint32_t>(quad));
  return {{n.z0, n.z1, n.z2, n.z3}};
}

// a / b, in 32 bits where they suffice: a 64-bit division costs as much as the noise.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// body(row, quad of the row, elements of it) for every quad of every row of `width` elements.
template <class F>
__device__ __forceinline__ void for_each_quad(int64_t batch, int64_t width, F body) {
  const int64_t quads = (width + 3) / 4, total = batch * quads, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t row = quotient(i, quads), quad = i - row * quads, left = width - 4 * quad;
    body(row, quad, left < 4 ? static_cast<int>(left) : 4);
  }
}

template <class Args>
using Kernel = void (*)(Args);

// The kernels of an op, by element type and by whether rows divide into aligned quads.
template <class Args>
struct Kernels {
  Kernel<Args> float32[2], bfloat16[2], float16[2];
};

template <class Args, class... Addresses>
const char *launch(const Kernels<Args> &kernels, const Args &args, void *stream, int64_t row_width,
                   int64_t aligned_width, Addresses... addresses) {
  const int64_t blocks = (args.batch * ((row_width + 3) / 4) + kThreads - 1) / kThreads;
  if (blocks == 0)
    return nullptr;
  const size_t size = args.dtype == DType::kFloat32 ? 4 : 2;
  const bool whole = aligned_width % 4 == 0 && ((reinterpret_cast<uintptr_t>(addresses) % (4 * size) == 0) && ...);
  const auto &variants = args.dtype == DType::kFloat32    ? kernels.float32
                         : args.dtype == DType::kBFloat16 ? kernels.bfloat16
                                                          : kernels.float16;
  const auto grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  variants[whole]<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define MODAFILL_KERNELS(kernel)                                                                                       \
  {                                                                                                                    \
    {kernel<float, false>, kernel<float, true>}, {kernel<__nv_bfloat16, false>, kernel<__nv_bfloat16, true>}, {        \
      kernel<__half, false>, kernel<__half, true>                                                                      \
    }                                                                                                                  \
  }

} // namespace
} // namespace modafill::cuda
