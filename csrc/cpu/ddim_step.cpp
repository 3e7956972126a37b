#include <algorithm>
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
  const auto formula_of = [&](int64_t row) {
    return DdimRow<C>(args.table, step_of(args.step, row), step_of(args.prev_step, row), static_cast<C>(args.eta));
  };
  const int64_t total = args.batch * args.width;
  if (total == 0)
    return;
  // Rows of the same step share its formula; without noise, and within the caches, they are one long row.
  const bool same = args.step.stride == 0 && args.prev_step.stride == 0;
  const DdimRow<C> first = formula_of(0);
  if (same && !noisy && total * static_cast<int64_t>(sizeof(T)) <= kStreamedBytes) {
    const T *const x = static_cast<const T *>(args.x), *const eps = static_cast<const T *>(args.eps);
    T *const out = static_cast<T *>(args.out);
    deal_out(total, std::min<int64_t>(total / kElementsPerThread, threads), [=](int64_t begin, int64_t end) {
      const int count = static_cast<int>(end - begin);
      const T *const x_t = x + begin, *const eps_t = eps + begin;
      if (clipped)
        fill(out + begin, count,
             [=](int i) { return first.clipped(Element<T>::load(x_t[i]), Element<T>::load(eps_t[i]), bound); });
      else
        fill(out + begin, count,
             [=](int i) { return first.folded(Element<T>::load(x_t[i]), Element<T>::load(eps_t[i])); });
    });
    return;
  }
  for_each_chunk(args.batch, args.width, threads, [&](int64_t row, int64_t begin, int count) {
    const DdimRow<C> formula = same ? first : formula_of(row);
    const int64_t offset = row * args.width + begin;
    const T *const x = static_cast<const T *>(args.x) + offset;
    const T *const eps = static_cast<const T *>(args.eps) + offset;
    Destination<T> out(static_cast<T *>(args.out) + offset, total);
    const auto write = [&](auto mean) {
      if (noisy) {
        prefetch(x, count);
        prefetch(eps, count);
        alignas(64) float z[kChunk];
        fill_normals(seed, row_id_of(args.key, row),
                     draw_word(step_of(args.step, row), static_cast<uint32_t>(Draw::kReverse)), begin, count, z);
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
