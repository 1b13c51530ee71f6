/* The threads of an engine, linked into its library: runs the parallel loops of TVM's kernels.
 *
 * TVM's own pool waits with sched_yield: with one other busy process on a core, every parallel loop then waits for
 * that process's time slice, and an engine runs 30 to 60 times slower. It also binds threads to cores whatever the
 * affinity of the process. Here the caller and the workers claim tasks one by one (a worker that the system does not
 * run holds nothing up), wait briefly with a pause instruction, and then sleep.
 *
 * Kernels that ask TVM for its number of threads ("runtime.NumThreads") are told this pool's: TVM's own is never made.
 *
 * Exported for TVM: threads(n) -> n, the number of threads that the following calls use, the caller's included.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 4096, WORKER_SPIN_NS = 60000, CALLER_SPIN_NS = 20000, PAUSES_PER_LOOK = 32 };

typedef struct {
  void* sync;
  int32_t tasks;
} Group;
typedef int (*Body)(int task, Group* group, void* data);
typedef int (*Launch)(Body body, void* data, int tasks);

typedef int (*Lookup)(void* context, const char* name, void** found);

/* TVM's kernels launch their loops and find functions through these pointers of their library, which TVM sets when it
 * loads the library; absent where no kernel needs them. */
extern Launch __TVMBackendParallelLaunch __attribute__((weak));
extern Lookup __TVMFFIEnvModLookupFromImports __attribute__((weak));

typedef struct {
  int32_t type;
  uint32_t padding;
  int64_t value;
} Any;
enum { ANY_INT = 1 };
typedef int (*Call)(void* self, const Any* args, int32_t count, Any* result);
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
extern int TVMFFIFunctionCreate(void* self, Call call, void (*deleter)(void*), void** function);

/* What threads write often lies on cache lines of its own. */
#define OWN_LINE __attribute__((aligned(64)))

/* The running job. `open_tasks` says what is left of it: its number (32 bits), tasks in all (16), the next task (16).
 * A claim is one exchange, so that a late worker can only claim from the job that is running. */
static OWN_LINE struct {
  _Atomic uint64_t open_tasks;
  Body body;
  void* data;
  Group group;
} job;
static OWN_LINE _Atomic uint32_t done; /* tasks that workers have finished, ever; a futex word */
static OWN_LINE _Atomic uint32_t wakes; /* changes when sleepers are woken; a futex word */
static _Atomic int sleepers;
static OWN_LINE _Atomic int active = 1;
static _Atomic int caller_sleeps, failed, stopping;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held while a job runs or the number of threads changes */
static pthread_t workers[MAX_THREADS];
static int worker_count;
static uint32_t number, expected; /* of the latest job; of `done` when it has ended */
static pid_t owner;
static Lookup tvm_lookup;
static void* thread_count; /* a function of TVM; lives as long as the process, nobody calls it after this library */

static void futex(_Atomic uint32_t* word, int operation, uint32_t value) {
  syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, 0, 0, 0);
}

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int work_waits(void) {
  uint64_t state = atomic_load_explicit(&job.open_tasks, memory_order_relaxed);
  return (state & 0xFFFF) < (state >> 16 & 0xFFFF);
}

/* Run tasks until none is left; how many. */
static uint32_t run_tasks(int is_worker) {
  uint32_t count = 0;
  uint64_t state = atomic_load(&job.open_tasks);
  while ((state & 0xFFFF) < (state >> 16 & 0xFFFF)) {
    if (!atomic_compare_exchange_weak(&job.open_tasks, &state, state + 1)) continue;
    if (job.body((int)(state & 0xFFFF), &job.group, job.data)) atomic_store(&failed, 1);
    count++;
    if (is_worker) {
      atomic_fetch_add(&done, 1);
      if (atomic_load(&caller_sleeps)) futex(&done, FUTEX_WAKE, 1);
    }
    state = atomic_load(&job.open_tasks);
  }
  return count;
}

static int spin_for_work(void) {
  int64_t end = now_ns() + WORKER_SPIN_NS;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK; i++) {
      if (work_waits() || atomic_load(&stopping)) return 1;
      pause_cpu();
    }
  } while (now_ns() < end);
  return 0;
}

static void* worker(void* argument) {
  int number = (int)(intptr_t)argument;
  prctl(PR_SET_NAME, "engine-worker");
  while (!atomic_load(&stopping)) {
    int mine = number < atomic_load(&active);
    if (mine) run_tasks(1);
    if (mine && spin_for_work()) continue;
    atomic_fetch_add(&sleepers, 1);
    uint32_t seen = atomic_load(&wakes);
    mine = number < atomic_load(&active);
    if (!(mine && work_waits()) && !atomic_load(&stopping)) futex(&wakes, FUTEX_WAIT, seen);
    atomic_fetch_sub(&sleepers, 1);
  }
  return 0;
}

/* Until the workers have finished as many tasks as `expected` says. */
static void wait_for_workers(void) {
  int64_t end = now_ns() + CALLER_SPIN_NS;
  do {
    for (int i = 0; i < PAUSES_PER_LOOK; i++) {
      if (atomic_load(&done) == expected) return;
      pause_cpu();
    }
  } while (now_ns() < end);
  atomic_store(&caller_sleeps, 1);
  uint32_t finished;
  while ((finished = atomic_load(&done)) != expected) futex(&done, FUTEX_WAIT, finished);
  atomic_store(&caller_sleeps, 0);
}

static void wake_sleepers(void) {
  atomic_fetch_add(&wakes, 1);
  futex(&wakes, FUTEX_WAKE, INT_MAX);
}

static int run_alone(Body body, void* data, int tasks) {
  Group group = {0, tasks};
  int bad = 0;
  for (int task = 0; task < tasks; task++) bad |= body(task, &group, data);
  return bad ? -1 : 0;
}

static int launch(Body body, void* data, int tasks) {
  int threads = atomic_load(&active);
  if (threads < 2 || tasks > 0xFFFF || pthread_mutex_trylock(&busy)) return run_alone(body, data, tasks > 0 ? tasks : 1);
  job.body = body;
  job.data = data;
  job.group.tasks = tasks > 0 ? tasks : threads;
  uint32_t count = (uint32_t)job.group.tasks;
  atomic_store(&job.open_tasks, (uint64_t)++number << 32 | (uint64_t)count << 16);
  if (atomic_load(&sleepers)) wake_sleepers();
  expected += count - run_tasks(0);
  wait_for_workers();
  int bad = atomic_load(&failed);
  if (bad) atomic_store(&failed, 0);
  pthread_mutex_unlock(&busy);
  return bad ? -1 : 0;
}

/* Start workers until there are `count`; the number there is afterwards. Signals stay with the program's threads. */
static int grow(int count) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  while (worker_count < count) {
    if (pthread_create(&workers[worker_count], 0, worker, (void*)(intptr_t)(worker_count + 1))) break;
    worker_count++;
  }
  pthread_sigmask(SIG_SETMASK, &before, 0);
  return worker_count;
}

static void answer(Any* result, int value) {
  result->type = ANY_INT;
  result->padding = 0;
  result->value = value;
}

static int count_threads(void* self, const Any* args, int32_t count, Any* result) {
  (void)self, (void)args, (void)count;
  answer(result, atomic_load(&active));
  return 0;
}

static int lookup(void* context, const char* name, void** found) {
  if (strcmp(name, "runtime.NumThreads")) return tvm_lookup(context, name, found);
  *found = thread_count;
  return 0;
}

/* Let the kernels of this library use this pool. */
static int install(void) {
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (!&__TVMFFIEnvModLookupFromImports || __TVMFFIEnvModLookupFromImports == lookup) return 0;
  if (!thread_count && TVMFFIFunctionCreate(0, count_threads, 0, &thread_count)) return -1;
  tvm_lookup = __TVMFFIEnvModLookupFromImports;
  __TVMFFIEnvModLookupFromImports = lookup;
  return 0;
}

__attribute__((visibility("default"))) int __tvm_ffi_threads(void* self, const Any* args, int32_t count, Any* result) {
  (void)self;
  if (count != 1 || args[0].type != ANY_INT || args[0].value < 1 || args[0].value > MAX_THREADS) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "threads(n) takes a number from 1 to 4096");
    return -1;
  }
  int threads = (int)args[0].value;
  pthread_mutex_lock(&busy);
  if (owner != getpid()) worker_count = 0; /* a forked child has none of its parent's threads */
  owner = getpid();
  int enough = grow(threads - 1) >= threads - 1;
  if (enough) atomic_store(&active, threads);
  int bad = enough ? install() : 0;
  pthread_mutex_unlock(&busy);
  if (!enough) TVMFFIErrorSetRaisedFromCStr("RuntimeError", "the system starts no more threads");
  if (!enough || bad) return -1;
  answer(result, threads);
  return 0;
}

__attribute__((destructor)) static void stop(void) {
  if (owner != getpid()) return;
  atomic_store(&stopping, 1);
  wake_sleepers();
  for (int i = 0; i < worker_count; i++) pthread_join(workers[i], 0);
}
