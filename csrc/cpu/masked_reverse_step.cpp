#include "rows.h"

namespace modafill {
namespace {

template <class T>
void masked_reverse_step_of(const MaskedReverseStepArgs &args, int threads) {
  using C = Compute<T>;
  const int64_t width = args.modalities * args.width;
  const uint64_t seed = seed_of(args.key);
  // f(available, done, length) for each run of elements of a chunk that belong to one modality.
  const auto each_modality = [&](int64_t row, int64_t begin, int count, auto f) {
    int done = 0;
    for (int64_t m = begin / args.width; done < count; ++m) {
      const int64_t left = (m + 1) * args.width - begin;
      const int length = (left < count ? static_cast<int>(left) : count) - done;
      f(args.available[row * args.modalities + m], done, length);
      done += length;
    }
  };
  for_each_chunk(args.batch, width, threads, [&](int64_t row, int64_t begin, int count) {
    const int64_t step = step_of(args.step, row);
    const ReverseRow<C> formula(args.table, step);
    const int64_t offset = row * width + begin;
    alignas(64) float noise[kChunk];
    if (formula.noisy) {
      each_modality(row, begin, count, [&](bool available, int done, int length) {
        if (available) {
          prefetch(static_cast<const T *>(args.observed) + offset + done, length);
        } else {
          prefetch(static_cast<const T *>(args.x) + offset + done, length);
          prefetch(static_cast<const T *>(args.eps) + offset + done, length);
        }
      });
      fill_normals(seed, row_id_of(args.key, row), draw_word(step, static_cast<uint32_t>(Draw::kReverse)), begin, count,
                   noise);
    }
    Destination<T> out(static_cast<T *>(args.out) + offset, args.batch * width);
    each_modality(row, begin, count, [&](bool available, int done, int length) {
      T *const target = out.data() + done;
      const float *const z = noise + done;
      if (available) {
        const T *const observed = static_cast<const T *>(args.observed) + offset + done;
        if (formula.noisy)
          fill(target, length, [&](int i) { return formula.renoised(Element<T>::load(observed[i]), C(z[i])); });
        else
          fill(target, length, [&](int i) { return formula.renoised(Element<T>::load(observed[i])); });
      } else {
        const T *const x = static_cast<const T *>(args.x) + offset + done;
        const T *const eps = static_cast<const T *>(args.eps) + offset + done;
        if (formula.noisy)
          fill(target, length,
               [&](int i) { return formula.generated(Element<T>::load(x[i]), Element<T>::load(eps[i]), C(z[i])); });
        else
          fill(target, length,
               [&](int i) { return formula.generated(Element<T>::load(x[i]), Element<T>::load(eps[i])); });
      }
    });
    out.flush(count);
  });
}

} // namespace

namespace MODAFILL_ISA {

void masked_reverse_step(const MaskedReverseStepArgs &args, int threads) {
  for_dtype(args.dtype, [&](auto element) { masked_reverse_step_of<decltype(element)>(args, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
