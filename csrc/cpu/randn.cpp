#include "rows.h"

namespace modafill {
namespace {

template <class T>
void randn_of(const RandnArgs &args, int threads) {
  using C = Compute<T>;
  const uint64_t seed = seed_of(args.key);
  for_each_chunk(args.batch, args.width, threads, [&](int64_t row, int64_t begin, int count) {
    alignas(64) float z[kChunk];
    fill_normals(seed, row_id_of(args.key, row), draw_word(step_of(args.step, row), args.draw), begin, count, z);
    Destination<T> out(static_cast<T *>(args.out) + row * args.width + begin, args.batch * args.width);
    fill(out.data(), count, [&](int i) { return C(z[i]); });
    out.flush(count);
  });
}

} // namespace

namespace MODAFILL_ISA {

void randn(const RandnArgs &args, int threads) {
  for_dtype(args.dtype, [&](auto element) { randn_of<decltype(element)>(args, threads); });
}

} // namespace MODAFILL_ISA
} // namespace modafill
