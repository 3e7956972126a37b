#include <cmath>

#include "quads.cuh"

namespace modafill::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) ddim_step_kernel(const DdimStepArgs args) {
  const auto eta = static_cast<float>(args.eta), bound = static_cast<float>(args.clip);
  for_each_quad(args.batch, args.width, [&](int64_t row, int64_t quad, int count) {
    const int64_t step = step_of(args.step, row);
    const DdimRow<float> formula(args.table, step, step_of(args.prev_step, row), eta);
    const int64_t offset = row * args.width + 4 * quad;
    const Quad x = load<T, kWhole>(args.x, offset, count), eps = load<T, kWhole>(args.eps, offset, count);
    Quad out;
    for (int i = 0; i < 4; ++i)
      out.values[i] = bound < HUGE_VALF ? formula.clipped(x.values[i], eps.values[i], bound)
                                        : formula.folded(x.values[i], eps.values[i]);
    if (eta > 0.0f) {
      const Quad z = quad_normals(args.key, row, step, static_cast<uint32_t>(Draw::kReverse), quad);
      for (int i = 0; i < 4; ++i)
        out.values[i] = formula.with_noise(out.values[i], z.values[i]);
    }
    store<T, kWhole>(args.out, offset, count, out);
  });
}

} // namespace

const char *ddim_step(const DdimStepArgs &args, void *stream) {
  static constexpr Kernels<DdimStepArgs> kKernels = MODAFILL_KERNELS(ddim_step_kernel);
  return launch(kKernels, args, stream, args.width, args.width, args.out, args.x, args.eps);
}

} // namespace modafill::cuda
