// SPDX-License-Identifier: Apache-2.0
// Stands for libcuda.so.1, the driver: libraries that load it find no device.

#define CUDA_ERROR_NO_DEVICE 100

int cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 0;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "a pretended device";
  return 0;
}
