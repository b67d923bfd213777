// SPDX-License-Identifier: Apache-2.0
// Preloaded before libc10_cuda: how many devices autograd starts threads for, and that none of them has been used.

#include <cstdint>

static int8_t devices = 0;

extern "C" void pretend_devices(int8_t number) { devices = number; }

namespace c10::cuda {

int8_t device_count() noexcept { return devices; }

int8_t device_count_ensure_non_zero() { return devices; }

bool hasPrimaryContext(int8_t) { return false; }

}  // namespace c10::cuda
