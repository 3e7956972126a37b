// The Python module: raw pointers, sizes and a thread count or stream handle in, so that it needs no torch to build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/ops.h"
#ifdef MODAFILL_CUDA_ARCHITECTURES
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace modafill {
namespace {

struct CpuOps {
  const char *name;
  decltype(&baseline::masked_reverse_step) masked_reverse_step;
  decltype(&baseline::ddim_step) ddim_step;
  decltype(&baseline::add_noise) add_noise;
  decltype(&baseline::randn) randn;
  decltype(&baseline::prompt_attention) prompt_attention;
  decltype(&baseline::prompt_attention_backward) prompt_attention_backward;
  decltype(&baseline::conv_gelu_conv) conv_gelu_conv;
  decltype(&baseline::conv_gelu_conv_backward) conv_gelu_conv_backward;
  decltype(&baseline::token_denoiser) token_denoiser;
  decltype(&baseline::token_denoiser_size) token_denoiser_size;
  decltype(&baseline::pack_token_denoiser) pack_token_denoiser;
  bool bfloat16 = false; // whether token_denoiser multiplies pairs of bfloat16
};

#define MODAFILL_OPS_OF(isa)                                                                                           \
  {#isa,                                                                                                               \
   isa::masked_reverse_step,                                                                                           \
   isa::ddim_step,                                                                                                     \
   isa::add_noise,                                                                                                     \
   isa::randn,                                                                                                         \
   isa::prompt_attention,                                                                                              \
   isa::prompt_attention_backward,                                                                                     \
   isa::conv_gelu_conv,                                                                                                \
   isa::conv_gelu_conv_backward,                                                                                       \
   isa::token_denoiser,                                                                                                \
   isa::token_denoiser_size,                                                                                           \
   isa::pack_token_denoiser}

// As `ops`, with products of bfloat16 where this processor has them.
CpuOps with_bfloat16(CpuOps ops) {
#ifdef MODAFILL_BFLOAT16
  if (__builtin_cpu_supports("avx512bf16")) {
    ops.token_denoiser = v4bf16::token_denoiser;
    ops.token_denoiser_size = v4bf16::token_denoiser_size;
    ops.pack_token_denoiser = v4bf16::pack_token_denoiser;
    ops.bfloat16 = true;
  }
#endif
  return ops;
}

// The best instruction set this processor has, or the one that MODAFILL_CPU_ISA names.
CpuOps choose_cpu_ops() {
  const char *const wanted = std::getenv("MODAFILL_CPU_ISA");
  const auto fits = [&](const char *name, bool supported) {
    if (!wanted || !*wanted)
      return supported;
    if (std::string(wanted) != name)
      return false;
    if (!supported)
      throw std::runtime_error(std::string("MODAFILL_CPU_ISA: this processor does not have ") + name);
    return true;
  };
#ifdef MODAFILL_X86
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (fits("v4", has_v4))
    return with_bfloat16(MODAFILL_OPS_OF(v4));
  if (fits("v3", has_v3))
    return MODAFILL_OPS_OF(v3);
#endif
  if (fits("baseline", true))
    return MODAFILL_OPS_OF(baseline);
  throw std::runtime_error(std::string("MODAFILL_CPU_ISA: got ") + wanted + ", expected baseline, v3 or v4");
}

// Ask for huge pages for memory that is about to be written: a large block is mapped anew for each call, and in small
// pages the system spends longer on handing it over than an op on filling it. A system that has none goes on without.
void prefer_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (first < last)
    madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

Steps steps(uintptr_t values, int64_t stride, int64_t value) { return {pointer<const int64_t>(values), stride, value}; }

NoiseKey noise_key(uintptr_t seeds, int64_t seed, uintptr_t row_ids) {
  return {pointer<const int64_t>(seeds), seed, pointer<const int64_t>(row_ids)};
}

MaskedReverseStepArgs masked_reverse_step_args(int dtype, uintptr_t out, uintptr_t x, uintptr_t eps, uintptr_t observed,
                                               uintptr_t available, uintptr_t table, int64_t last_step,
                                               uintptr_t step_values, int64_t step_stride, int64_t step,
                                               uintptr_t seeds, int64_t seed, uintptr_t row_ids, int64_t batch,
                                               int64_t modalities, int64_t width) {
  return {static_cast<DType>(dtype),
          pointer<void>(out),
          pointer<const void>(x),
          pointer<const void>(eps),
          pointer<const void>(observed),
          pointer<const bool>(available),
          {pointer<const float>(table), last_step},
          steps(step_values, step_stride, step),
          noise_key(seeds, seed, row_ids),
          batch,
          modalities,
          width};
}

DdimStepArgs ddim_step_args(int dtype, uintptr_t out, uintptr_t x, uintptr_t eps, uintptr_t table, int64_t last_step,
                            uintptr_t step_values, int64_t step_stride, int64_t step, uintptr_t prev_step_values,
                            int64_t prev_step_stride, int64_t prev_step, double eta, double clip, uintptr_t seeds,
                            int64_t seed, uintptr_t row_ids, int64_t batch, int64_t width) {
  return {static_cast<DType>(dtype),
          pointer<void>(out),
          pointer<const void>(x),
          pointer<const void>(eps),
          {pointer<const float>(table), last_step},
          steps(step_values, step_stride, step),
          steps(prev_step_values, prev_step_stride, prev_step),
          eta,
          clip,
          noise_key(seeds, seed, row_ids),
          batch,
          width};
}

AddNoiseArgs add_noise_args(int dtype, uintptr_t noisy, uintptr_t noise, uintptr_t x, uintptr_t table,
                            int64_t last_step, uintptr_t step_values, int64_t step_stride, int64_t step,
                            uintptr_t seeds, int64_t seed, uintptr_t row_ids, int64_t batch, int64_t width) {
  return {static_cast<DType>(dtype),
          pointer<void>(noisy),
          pointer<void>(noise),
          pointer<const void>(x),
          {pointer<const float>(table), last_step},
          steps(step_values, step_stride, step),
          noise_key(seeds, seed, row_ids),
          batch,
          width};
}

RandnArgs randn_args(int dtype, uintptr_t out, uintptr_t step_values, int64_t step_stride, int64_t step,
                     uintptr_t seeds, int64_t seed, uintptr_t row_ids, uint32_t draw, int64_t batch, int64_t width) {
  return {static_cast<DType>(dtype),
          pointer<void>(out),
          steps(step_values, step_stride, step),
          noise_key(seeds, seed, row_ids),
          draw,
          batch,
          width};
}

using Strides = std::array<int64_t, 3>;

HeadStrides head_strides(const Strides &strides) { return {strides[0], strides[1], strides[2]}; }

// The arguments that forward and backward share, in one object for Python to build once.
PromptAttentionArgs prompt_attention_args(int dtype, uintptr_t q, uintptr_t k, uintptr_t v, const Strides &q_strides,
                                          const Strides &k_strides, const Strides &v_strides, uintptr_t bias,
                                          uintptr_t mode, uintptr_t key_lengths, int64_t batch, int64_t heads,
                                          int64_t queries, int64_t keys, int64_t width, int64_t modes,
                                          int64_t bias_heads, double scale, bool causal, double dropout,
                                          uintptr_t seeds, int64_t seed, uintptr_t row_ids) {
  return {static_cast<DType>(dtype),
          pointer<const void>(q),
          pointer<const void>(k),
          pointer<const void>(v),
          head_strides(q_strides),
          head_strides(k_strides),
          head_strides(v_strides),
          pointer<const void>(bias),
          pointer<const int64_t>(mode),
          pointer<const int64_t>(key_lengths),
          batch,
          heads,
          queries,
          keys,
          width,
          modes,
          bias_heads,
          scale,
          causal,
          static_cast<uint32_t>(dropout * 4294967296.0),
          1.0 / (1.0 - dropout),
          noise_key(seeds, seed, row_ids)};
}

PromptAttentionForward prompt_attention_forward(const PromptAttentionArgs &attention, uintptr_t out,
                                                const Strides &out_strides, uintptr_t logsumexp) {
  return {attention, pointer<void>(out), head_strides(out_strides), pointer<void>(logsumexp)};
}

PromptAttentionBackward prompt_attention_backward(const PromptAttentionArgs &attention, uintptr_t grad,
                                                  const Strides &grad_strides, uintptr_t logsumexp, uintptr_t q_grad,
                                                  uintptr_t k_grad, uintptr_t v_grad, uintptr_t bias_grad,
                                                  uintptr_t partial, const Strides &q_grad_strides,
                                                  const Strides &k_grad_strides, const Strides &v_grad_strides,
                                                  int64_t groups) {
  return {attention,
          pointer<const void>(grad),
          head_strides(grad_strides),
          pointer<const void>(logsumexp),
          pointer<void>(q_grad),
          pointer<void>(k_grad),
          pointer<void>(v_grad),
          pointer<void>(bias_grad),
          pointer<void>(partial),
          head_strides(q_grad_strides),
          head_strides(k_grad_strides),
          head_strides(v_grad_strides),
          groups};
}

ConvGeluConvArgs conv_gelu_conv_args(int dtype, uintptr_t out, uintptr_t x, uintptr_t first, uintptr_t first_bias,
                                     uintptr_t second, uintptr_t second_bias, int64_t batch, int64_t length,
                                     int64_t inputs, int64_t hidden, int64_t outputs, int64_t first_taps,
                                     int64_t second_taps, bool tanh) {
  return {static_cast<DType>(dtype),
          pointer<void>(out),
          pointer<const void>(x),
          pointer<const void>(first),
          pointer<const void>(first_bias),
          pointer<const void>(second),
          pointer<const void>(second_bias),
          batch,
          length,
          inputs,
          hidden,
          outputs,
          first_taps,
          second_taps,
          tanh};
}

ConvGeluConvArgs conv_gelu_conv_forward(const ConvGeluConvArgs &args) { return args; }

ConvGeluConvBackward conv_gelu_conv_backward(const ConvGeluConvArgs &forward, uintptr_t grad, uintptr_t x_grad,
                                             uintptr_t first_grad, uintptr_t first_bias_grad, uintptr_t second_grad,
                                             uintptr_t second_bias_grad, int64_t groups) {
  return {forward,
          pointer<const void>(grad),
          pointer<void>(x_grad),
          pointer<void>(first_grad),
          pointer<void>(first_bias_grad),
          pointer<void>(second_grad),
          pointer<void>(second_bias_grad),
          groups};
}

TokenDenoiserArgs token_denoiser_args(int dtype, int weights_dtype, uintptr_t out, uintptr_t x, uintptr_t available,
                                      uintptr_t added, const std::vector<uintptr_t> &weights, uintptr_t packed,
                                      bool pairs, int64_t batch, int64_t tokens, int64_t width, int64_t channels,
                                      int64_t heads, int64_t hidden, int64_t layers, double epsilon) {
  std::vector<const void *> tensors;
  for (const uintptr_t weight : weights)
    tensors.push_back(pointer<const void>(weight));
  return {static_cast<DType>(dtype),
          static_cast<DType>(weights_dtype),
          pointer<void>(out),
          pointer<const void>(x),
          pointer<const bool>(available),
          pointer<const void>(added),
          std::move(tensors),
          pointer<void>(packed),
          pairs,
          batch,
          tokens,
          width,
          channels,
          heads,
          hidden,
          layers,
          epsilon};
}

TokenDenoiserArgs token_denoiser_job(const TokenDenoiserArgs &args) { return args; }

void check_step(const char *name, int64_t row, int64_t step, int64_t low, int64_t high) {
  if (step < low || step > high)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(step) + " in row " + std::to_string(row) +
                                ", expected a diffusion step in " + std::to_string(low) + "\u2026" +
                                std::to_string(high));
}

// Every step in memory is in [low, high]; integers were checked before they came here.
void check_steps(const Steps &steps, int64_t batch, int64_t low, int64_t high) {
  for (int64_t row = 0; steps.values && row < (steps.stride ? batch : 1); ++row)
    check_step("step", row, step_of(steps, row), low, high);
}

void check(const MaskedReverseStepArgs &args) { check_steps(args.step, args.batch, 1, args.table.last); }

void check(const AddNoiseArgs &args) { check_steps(args.step, args.batch, 1, args.table.last); }

void check(const RandnArgs &args) { check_steps(args.step, args.batch, 0, kMaxStep); }

void check(const DdimStepArgs &args) {
  check_steps(args.step, args.batch, 1, args.table.last);
  if (args.step.values || args.prev_step.values)
    for (int64_t row = 0; row < (args.step.stride || args.prev_step.stride ? args.batch : 1); ++row)
      check_step("prev_step", row, step_of(args.prev_step, row), 0, step_of(args.step, row) - 1);
}

void check_each(const char *name, const int64_t *values, int64_t count, int64_t low, int64_t high) {
  for (int64_t row = 0; values && row < count; ++row)
    if (values[row] < low || values[row] > high)
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(values[row]) + " in row " +
                                  std::to_string(row) + ", expected " + std::to_string(low) + "\u2026" +
                                  std::to_string(high));
}

void check(const PromptAttentionArgs &args) {
  check_each("mode", args.mode, args.batch, 0, args.modes - 1);
  check_each("key_lengths", args.key_lengths, args.batch, 0, args.keys);
}

void check(const ConvGeluConvArgs &) {}

void check(const ConvGeluConvBackward &) {}

void check(const TokenDenoiserArgs &) {}

void check(const PromptAttentionForward &job) { check(job.attention); }

void check(const PromptAttentionBackward &job) { check(job.attention); }

template <class Args>
using CudaOp = const char *(*)(const Args &, void *);

// Binds `name`, whose last argument is the thread count, and `name`_cuda, whose last argument is the stream.
template <class Args, class... A>
void define(py::module_ &m, const std::string &name, Args (*make)(A...), void (*cpu)(const Args &, int),
            std::common_type_t<CudaOp<Args>> cuda) {
  m.def(name.c_str(), [=](A... a, int threads) {
    const Args args = make(a...);
    const py::gil_scoped_release release;
    check(args);
    cpu(args, threads);
  });
  if (cuda)
    m.def((name + "_cuda").c_str(), [=](A... a, uintptr_t stream) {
      if (const char *const error = cuda(make(a...), pointer<void>(stream)))
        throw std::runtime_error(name + ": " + error);
    });
}

} // namespace
} // namespace modafill

#ifdef MODAFILL_CUDA_ARCHITECTURES
#define MODAFILL_CUDA_OP(op) modafill::cuda::op
#else
#define MODAFILL_CUDA_OP(op) nullptr
#define MODAFILL_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_C, m) {
  using namespace modafill;
  const CpuOps cpu = choose_cpu_ops();
  m.attr("cpu_isa") = cpu.name;
  m.attr("cuda_architectures") = MODAFILL_CUDA_ARCHITECTURES;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("bfloat16_products") = cpu.bfloat16;
  m.def("prefer_huge_pages", prefer_huge_pages);
  define(m, "masked_reverse_step", masked_reverse_step_args, cpu.masked_reverse_step,
         MODAFILL_CUDA_OP(masked_reverse_step));
  define(m, "ddim_step", ddim_step_args, cpu.ddim_step, MODAFILL_CUDA_OP(ddim_step));
  define(m, "add_noise", add_noise_args, cpu.add_noise, MODAFILL_CUDA_OP(add_noise));
  define(m, "randn", randn_args, cpu.randn, MODAFILL_CUDA_OP(randn));
  py::class_<PromptAttentionArgs>(m, "PromptAttentionArgs").def(py::init(&prompt_attention_args));
  define(m, "prompt_attention", prompt_attention_forward, cpu.prompt_attention, nullptr);
  define(m, "prompt_attention_backward", prompt_attention_backward, cpu.prompt_attention_backward, nullptr);
  py::class_<ConvGeluConvArgs>(m, "ConvGeluConvArgs").def(py::init(&conv_gelu_conv_args));
  define(m, "conv_gelu_conv", conv_gelu_conv_forward, cpu.conv_gelu_conv, nullptr);
  define(m, "conv_gelu_conv_backward", conv_gelu_conv_backward, cpu.conv_gelu_conv_backward, nullptr);
  py::class_<TokenDenoiserArgs>(m, "TokenDenoiserArgs").def(py::init(&token_denoiser_args));
  define(m, "token_denoiser", token_denoiser_job, cpu.token_denoiser, nullptr);
  define(m, "pack_token_denoiser", token_denoiser_job, cpu.pack_token_denoiser, nullptr);
  m.def("token_denoiser_size", cpu.token_denoiser_size);
}
