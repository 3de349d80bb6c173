/* Runs TVM's parallel loops on the process's OpenMP threads.
 *
 * Compiled code calls the function behind the weak symbol __TVMBackendParallelLaunch.  TVM's
 * own runtime would put its thread pool there; without it the pointer is null.  Sharing the
 * OpenMP pool that torch and vLLM already keep warm avoids two pools fighting for the cores.
 */
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;

typedef int (*ParallelBody)(int task_id, ParallelGroup* group, void* captured);

/* Not there if no kernel of the library has a parallel loop. */
extern void* __TVMBackendParallelLaunch __attribute__((weak));

static int launch(ParallelBody body, void* captured, int num_task) {
  int failed = 0;
  if (num_task == 0) num_task = omp_get_max_threads();
  ParallelGroup group = {NULL, num_task};
#pragma omp parallel for schedule(static, 1) num_threads(num_task) reduction(| : failed)
  for (int task = 0; task < num_task; ++task) failed |= body(task, &group, captured);
  return failed ? -1 : 0;
}

__attribute__((constructor)) static void use_openmp(void) {
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void*)launch;
}
