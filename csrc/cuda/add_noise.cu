#include "quads.cuh"

namespace modafill::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) add_noise_kernel(const AddNoiseArgs args) {
  for_each_quad(args.batch, args.width, [&](int64_t row, int64_t quad, int count) {
    const int64_t step = step_of(args.step, row);
    const ForwardRow<float> formula(args.table, step);
    const int64_t offset = row * args.width + 4 * quad;
    const Quad x = load<T, kWhole>(args.x, offset, count);
    Quad z = quad_normals(args.key, row, step, static_cast<uint32_t>(Draw::kForward), quad);
    Quad noisy;
    for (int i = 0; i < 4; ++i)
      noisy.values[i] = formula.noisy(x.values[i], z.values[i]);
    store<T, kWhole>(args.noisy, offset, count, noisy);
    store<T, kWhole>(args.noise, offset, count, z);
  });
}

} // namespace

const char *add_noise(const AddNoiseArgs &args, void *stream) {
  static constexpr Kernels<AddNoiseArgs> kKernels = MODAFILL_KERNELS(add_noise_kernel);
  return launch(kKernels, args, stream, args.width, args.width, args.noisy, args.noise, args.x);
}

} // namespace modafill::cuda
