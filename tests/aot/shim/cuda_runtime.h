// Just enough CUDA to run kernels without shared memory or synchronisation on the CPU, one thread after another.
#pragma once

#include <cmath>
#include <cstddef>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "error"; }

template <class Kernel, class Args>
void run_grid(Kernel kernel, unsigned grid, unsigned threads, const Args &args) {
  gridDim = {grid, 1, 1};
  blockDim = {threads, 1, 1};
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
      kernel(args);
}
