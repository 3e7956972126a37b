#include <cmath>

#include "rows.h"

namespace modafill {
namespace {

template <class T>
void ddim_step_of(const DdimStepArgs &args, int threads) {
  using C = Compute<T>;
  const uint64_t seed = seed_of(args.key);
  const bool noisy = args.eta > 0.0, clipped = args.clip < HUGE_VAL;
  const C bound = static_cast<C>(args.clip);
  for_each_chunk(args.batch, args.width, threads, [&](int64_t row, int64_t begin, int count) {
    const int64_t step = step_of(args.step, row);
    const DdimRow<C> formula(args.table, step, step_of(args.prev_step, row), static_cast<C>(args.eta));
    const int64_t offset = row * args.width + begin;
    const T *const x = static_cast<const T *>(args.x) + offset;
    const T *const eps = static_cast<const T *>(args.eps) + offset;
    Destination<T> out(static_cast<T *>(args.out) + offset, args.batch * args.width);
    const auto write = [&](auto mean) {
      if (noisy) {
        prefetch(x, count);
        prefetch(eps, count);
        alignas(64) float z[kChunk];
        fill_normals(seed, row_id_of(args.key, row), draw_word(step, static_cast<uint32_t>(Draw::kReverse)), begin,
                     count, z);
        fill(out.data(), count, [&](int i) { return formula.with_noise(mean(i), C(z[i])); });
      } else {
        fill(out.data(), count, mean);
      }
    };
    if (clipped)
      write([&](int i) { return formula.clipped(Element<T>::load(x[i]), Element<T>::load(eps[i]), bound); });
    else
      write([&](int i) { return formula.folded(Element<T>::load(x[i]), Element<T>::load(eps[i])); });
    out.flush(count);
  });
}

} // namespace

namespace MODAFILL_ISA {

void ddim_step(const DdimStepArgs &args, int threads) {
  for_dtype(args.dtype, [&](auto element) { ddim_step_of<decltype(element)>(args, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
