/* Launches the kernels of a code object over HIP: linked into kernels.so of an artifact for AMD GPUs.
 *
 * Host functions call `<symbol>_kernel` below with a kernel's arguments, each of 8 bytes, then the grid (x, y, z), the
 * threads of a block, and the device.  A kernel runs on the stream that apache-tvm-ffi has for the device.  HIP is that
 * of the process (torch's), found once the first kernel is launched: the library loads on machines without it.
 *
 * An argument that is vllm_compile_workspace() becomes the address of WORKSPACE_BYTES of the device's memory, which
 * kernels that follow each other on a stream share: artifacts run on one stream of a device at a time.
 *
 * kernels.inc, written by schedules/rocm/build.py, has a line KERNEL(<symbol>_kernel) for each; kernels.hsaco is the
 * code object.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define MOST_DEVICES 64
#define MOST_ARGUMENTS 32
#define LAUNCH_ARGUMENTS 5 /* grid, threads, device */

/* Of apache-tvm-ffi (tvm/ffi/c_api.h, tvm/ffi/extra/c_env_api.h). */
typedef struct {
  int32_t type, padding;
  uint64_t bits;
} Any;
extern void* TVMFFIEnvGetStream(int32_t device_type, int32_t device);
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
enum { ROCM = 10 }; /* kDLROCM of dlpack.h */

/* Of HIP (hip/hip_runtime_api.h). */
#define LAUNCH_BUFFER_POINTER ((void*)1)
#define LAUNCH_BUFFER_SIZE ((void*)2)
#define LAUNCH_END ((void*)3)
static struct {
  int (*hipGetDevice)(int*);
  int (*hipSetDevice)(int);
  int (*hipModuleLoadData)(void**, const void*);
  int (*hipMalloc)(void**, size_t);
  int (*hipModuleGetFunction)(void**, void*, const char*);
  int (*hipModuleLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                               void**, void**);
  const char* (*hipGetErrorString)(int);
} hip;

typedef struct {
  const char* name;
  void* functions[MOST_DEVICES]; /* null until it is first launched there */
} Kernel;

__asm__(
    ".section .rodata\n.balign 4096\nvllm_compile_code_object:\n.incbin \"kernels.hsaco\"\n.byte 0\n.previous\n");
extern const char vllm_compile_code_object[] __attribute__((visibility("hidden")));

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static void* modules[MOST_DEVICES];
static void* workspaces[MOST_DEVICES]; /* allocated with the module: before a graph is captured */

__attribute__((visibility("hidden"))) void* vllm_compile_workspace(void) { return workspaces; }

static int fail(const char* doing, const char* why) {
  char message[512];
  snprintf(message, sizeof message, "%s: %s", doing, why);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}

/* 0, or -1 with the error set. */
static int check(int status, const char* doing) { return status ? fail(doing, hip.hipGetErrorString(status)) : 0; }

static int is_hip(struct dl_phdr_info* library, size_t size, void* path) {
  const char* name = strrchr(library->dlpi_name, '/');
  if (strncmp(name ? name + 1 : library->dlpi_name, "libamdhip64.so", 14)) return 0;
  snprintf(path, 4096, "%s", library->dlpi_name);
  return 1;
}

/* The HIP that is loaded already, so that streams and memory are torch's; else the newest there is. */
static void* open_hip(void) {
  char path[4096];
  if (dl_iterate_phdr(is_hip, path)) return dlopen(path, RTLD_NOW);
  static const char* const names[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"};
  void* library = NULL;
  for (unsigned i = 0; i < sizeof names / sizeof *names && !library; i++) library = dlopen(names[i], RTLD_NOW);
  return library;
}

static pthread_once_t looked_for = PTHREAD_ONCE_INIT;
static char missing[256]; /* what of HIP is */

static void find_hip(void) {
  void* library = open_hip();
  if (!library) {
    snprintf(missing, sizeof missing, "%s", dlerror());
    return;
  }
#define FIND(function)                                                       \
  if (!(hip.function = (__typeof__(hip.function))dlsym(library, #function))) \
  snprintf(missing, sizeof missing, "no %s", #function)
  FIND(hipGetDevice);
  FIND(hipSetDevice);
  FIND(hipModuleLoadData);
  FIND(hipMalloc);
  FIND(hipModuleGetFunction);
  FIND(hipModuleLaunchKernel);
  FIND(hipGetErrorString);
#undef FIND
}

/* The kernel on the current device, which is `device`; null with the error set. */
static void* load(Kernel* kernel, int device) {
  void* function = NULL;
  pthread_mutex_lock(&loading);
  int failed = 0;
  if (WORKSPACE_BYTES && !workspaces[device])
    failed = check(hip.hipMalloc(&workspaces[device], WORKSPACE_BYTES), "allocating the workspace");
  if (!failed && !modules[device])
    failed = check(hip.hipModuleLoadData(&modules[device], vllm_compile_code_object), "loading the code object");
  if (!failed && !check(hip.hipModuleGetFunction(&function, modules[device], kernel->name), kernel->name))
    __atomic_store_n(&kernel->functions[device], function, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&loading);
  return function;
}

static int run(Kernel* kernel, const Any* arguments, int count, int device) {
  void* function = __atomic_load_n(&kernel->functions[device], __ATOMIC_ACQUIRE);
  if (!function && !(function = load(kernel, device))) return -1;
  uint64_t words[MOST_ARGUMENTS];
  for (int i = 0; i < count; i++)
    words[i] = arguments[i].bits == (uintptr_t)workspaces ? (uintptr_t)workspaces[device] : arguments[i].bits;
  size_t size = count * sizeof *words;
  void* extra[] = {LAUNCH_BUFFER_POINTER, words, LAUNCH_BUFFER_SIZE, &size, LAUNCH_END};
  const Any* grid = arguments + count;
  return check(hip.hipModuleLaunchKernel(function, grid[0].bits, grid[1].bits, grid[2].bits, grid[3].bits, 1, 1, 0,
                                         TVMFFIEnvGetStream(ROCM, device), NULL, extra),
               kernel->name);
}

static int launch(Kernel* kernel, const Any* arguments, int count) {
  count -= LAUNCH_ARGUMENTS;
  const Any* grid = arguments + count;
  const int device = (int)grid[4].bits;
  if (!grid[0].bits || !grid[1].bits || !grid[2].bits) return 0;
  if (count > MOST_ARGUMENTS || device < 0 || device >= MOST_DEVICES) return fail(kernel->name, "beyond its limits");
  pthread_once(&looked_for, find_hip);
  if (missing[0]) return fail("kernels for AMD GPUs need HIP", missing);
  int current;
  if (check(hip.hipGetDevice(&current), "hipGetDevice")) return -1;
  if (current == device) return run(kernel, arguments, count, device);
  if (check(hip.hipSetDevice(device), "hipSetDevice")) return -1;
  const int failed = run(kernel, arguments, count, device);
  return check(hip.hipSetDevice(current), "hipSetDevice") | failed;
}

/* Not exported: two artifacts in a process have kernels of the same names. */
#define KERNEL(symbol)                                                         \
  __attribute__((visibility("hidden"))) int symbol(void* self, const Any* arguments, int32_t count, Any* result) { \
    static Kernel kernel = {#symbol, {0}};                                     \
    return launch(&kernel, arguments, count);                                  \
  }
#include "kernels.inc"
