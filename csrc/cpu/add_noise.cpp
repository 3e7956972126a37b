#include "rows.h"

namespace modafill {
namespace {

template <class T>
void add_noise_of(const AddNoiseArgs &args, int threads) {
  using C = Compute<T>;
  const uint64_t seed = seed_of(args.key);
  const int64_t total = args.batch * args.width;
  for_each_chunk(args.batch, args.width, threads, [&](int64_t row, int64_t begin, int count) {
    const int64_t step = step_of(args.step, row);
    const ForwardRow<C> formula(args.table, step);
    const int64_t offset = row * args.width + begin;
    const T *const x = static_cast<const T *>(args.x) + offset;
    prefetch(x, count);
    alignas(64) float z[kChunk];
    fill_normals(seed, row_id_of(args.key, row), draw_word(step, static_cast<uint32_t>(Draw::kForward)), begin, count,
                 z);
    Destination<T> noisy(static_cast<T *>(args.noisy) + offset, total);
    fill(noisy.data(), count, [&](int i) { return formula.noisy(Element<T>::load(x[i]), C(z[i])); });
    noisy.flush(count);
    Destination<T> noise(static_cast<T *>(args.noise) + offset, total);
    fill(noise.data(), count, [&](int i) { return C(z[i]); });
    noise.flush(count);
  });
}

} // namespace

namespace MODAFILL_ISA {

void add_noise(const AddNoiseArgs &args, int threads) {
  for_dtype(args.dtype, [&](auto element) { add_noise_of<decltype(element)>(args, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
