// A CUDA driver, as far as Triton asks one, in which launches do nothing: tests/fake_gpu.py loads it.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Values of CUdevice_attribute, of an H200, and of CUfunction_attribute.
static int device_attribute(int attribute) {
  switch (attribute) {
    case 10:
      return 32;  // threads of a warp
    case 12:
      return 65536;  // registers of a block
    case 16:
      return 132;  // multiprocessors
    case 81:
      return 233472;  // bytes of shared memory of a multiprocessor
    case 97:
      return 232448;  // bytes of shared memory that a block may ask for
    default:
      return 1;
  }
}

enum { OK = 0, MAX_THREADS_PER_BLOCK = 0 };

int cuGetErrorString(int code, const char** text) {
  *text = "an error of the fake driver";
  return OK;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return OK;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = device_attribute(attribute);
  return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)1;
  return OK;
}
int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return OK;
}
int cuCtxSetCurrent(void* context) { return OK; }
int cuCtxGetLimit(size_t* value, int limit) {
  *value = 0;
  return OK;
}
int cuCtxSetLimit(int limit, size_t value) { return OK; }
int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)1;
  return OK;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)1;
  return OK;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return OK;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return OK; }
int cuFuncSetCacheConfig(void* function, int config) { return OK; }
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  memcpy(data, &pointer, sizeof(pointer));
  return OK;
}
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  *clusters = 1;
  return OK;
}
int cuTensorMapEncodeTiled(void* map) {
  memset(map, 0, 128);
  return OK;
}

static int64_t launches;
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  launches++;
  return OK;
}
int64_t fake_launches(void) { return launches; }
