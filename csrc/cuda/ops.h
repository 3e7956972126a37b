// The CUDA ops: each enqueues one kernel on `stream` of the current device and returns null or what went wrong.
#pragma once

#include "../common/step.h"

namespace modafill::cuda {

const char *masked_reverse_step(const MaskedReverseStepArgs &args, void *stream);
const char *ddim_step(const DdimStepArgs &args, void *stream);
const char *add_noise(const AddNoiseArgs &args, void *stream);
const char *randn(const RandnArgs &args, void *stream);

} // namespace modafill::cuda
