#include "quads.cuh"

namespace modafill::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) randn_kernel(const RandnArgs args) {
  for_each_quad(args.batch, args.width, [&](int64_t row, int64_t quad, int count) {
    const int64_t step = step_of(args.step, row);
    Quad z = quad_normals(args.key, row, step, args.draw, quad);
    if (step < 0 || step > kMaxStep)
      for (float &value : z.values)
        value = not_a_number();
    store<T, kWhole>(args.out, row * args.width + 4 * quad, count, z);
  });
}

} // namespace

const char *randn(const RandnArgs &args, void *stream) {
  static constexpr Kernels<RandnArgs> kKernels = MODAFILL_KERNELS(randn_kernel);
  return launch(kKernels, args, stream, args.width, args.width, args.out);
}

} // namespace modafill::cuda
