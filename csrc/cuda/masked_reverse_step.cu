#include "quads.cuh"

namespace modafill::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) masked_reverse_step_kernel(const MaskedReverseStepArgs args) {
  const int64_t row_width = args.modalities * args.width;
  for_each_quad(args.batch, row_width, [&](int64_t row, int64_t quad, int count) {
    const int64_t step = step_of(args.step, row);
    const ReverseRow<float> formula(args.table, step);
    const int64_t offset = row * row_width + 4 * quad;
    const bool *const available = args.available + row * args.modalities;
    // Bit i: element i was observed. What is not needed is not read.
    unsigned observed_elements = 0;
    if constexpr (kWhole) {
      observed_elements = available[quotient(4 * quad, args.width)] ? 0xF : 0;
    } else {
      for (int i = 0; i < count; ++i)
        observed_elements |= available[quotient(4 * quad + i, args.width)] ? 1u << i : 0;
    }
    Quad observed = {}, x = {}, eps = {}, z = {};
    if (observed_elements != 0)
      observed = load<T, kWhole>(args.observed, offset, count);
    if (observed_elements != (1u << count) - 1) {
      x = load<T, kWhole>(args.x, offset, count);
      eps = load<T, kWhole>(args.eps, offset, count);
    }
    if (formula.noisy)
      z = quad_normals(args.key, row, step, static_cast<uint32_t>(Draw::kReverse), quad);
    Quad out;
    for (int i = 0; i < 4; ++i) {
      const float renoised =
          formula.noisy ? formula.renoised(observed.values[i], z.values[i]) : formula.renoised(observed.values[i]);
      const float generated = formula.noisy ? formula.generated(x.values[i], eps.values[i], z.values[i])
                                            : formula.generated(x.values[i], eps.values[i]);
      out.values[i] = observed_elements >> i & 1 ? renoised : generated;
    }
    store<T, kWhole>(args.out, offset, count, out);
  });
}

} // namespace

const char *masked_reverse_step(const MaskedReverseStepArgs &args, void *stream) {
  static constexpr Kernels<MaskedReverseStepArgs> kKernels = MODAFILL_KERNELS(masked_reverse_step_kernel);
  return launch(kKernels, args, stream, args.modalities * args.width, args.width, args.out, args.x, args.eps,
                args.observed);
}

} // namespace modafill::cuda
