/* A libamdhip64.so without a GPU: what runtime/hip.c calls, checked, and handed to the test as it arrives. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, NOT_FOUND = 500 };
enum { DEVICES = 2, MOST = 4096 };

typedef struct {
  const void* image;
  int device;
} Module;

typedef struct {
  const Module* module;
  char name[256];
} Function;

typedef struct {
  const void* image;
  const char* kernel;
  int device;
  unsigned grid[3], block[3], shared;
  const void* stream;
  const void* arguments;
  size_t size;
} Launch;

/* Set by the test; 0 or an error of HIP. */
int (*fake_hip_on_load)(const void* image, int device);
int (*fake_hip_on_function)(const void* image, const char* name);
int (*fake_hip_on_launch)(const Launch*);

static int current;
static Module modules[MOST];
static Function functions[MOST];
static int module_count, function_count;

int hipGetDevice(int* device) {
  *device = current;
  return SUCCESS;
}

int hipSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
  current = device;
  return SUCCESS;
}

int hipModuleLoadData(void** module, const void* image) {
  if (module_count == MOST) return INVALID_VALUE;
  const int status = fake_hip_on_load(image, current);
  if (status) return status;
  modules[module_count] = (Module){image, current};
  *module = &modules[module_count++];
  return SUCCESS;
}

/* What nobody has written is not a number. */
int hipMalloc(void** pointer, size_t size) {
  *pointer = aligned_alloc(256, (size + 255) / 256 * 256);
  if (!*pointer) return INVALID_VALUE;
  memset(*pointer, 0xff, size);
  return SUCCESS;
}

int hipModuleGetFunction(void** function, void* module, const char* name) {
  const Module* from = module;
  if (function_count == MOST || strlen(name) >= sizeof functions->name) return INVALID_VALUE;
  const int status = fake_hip_on_function(from->image, name);
  if (status) return status;
  functions[function_count].module = from;
  strcpy(functions[function_count].name, name);
  *function = &functions[function_count++];
  return SUCCESS;
}

int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                          void** extra) {
  const Function* kernel = function;
  if (kernel < functions || kernel >= functions + function_count || parameters || !extra) return INVALID_VALUE;
  if (kernel->module->device != current) return INVALID_DEVICE;
  if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != (void*)3) return INVALID_VALUE;
  const Launch launch = {kernel->module->image,
                         kernel->name,
                         current,
                         {grid_x, grid_y, grid_z},
                         {block_x, block_y, block_z},
                         shared,
                         stream,
                         extra[1],
                         *(const size_t*)extra[3]};
  return fake_hip_on_launch(&launch);
}

const char* hipGetErrorString(int status) {
  switch (status) {
    case INVALID_VALUE:
      return "invalid argument";
    case INVALID_DEVICE:
      return "invalid device ordinal";
    case NOT_FOUND:
      return "named symbol not found";
    default:
      return "unrecognized error code";
  }
}
