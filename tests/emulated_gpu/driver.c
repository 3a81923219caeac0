/* An NVIDIA driver in host memory: CUDA's runtime and driver, cuBLAS and NVML, as one library.
 *
 * Memory is counted and kernels do nothing. What is there is what processes can do wrong: GPUs are
 * seen as CUDA_VISIBLE_DEVICES says, a forked process cannot use what its parent has begun, memory
 * belongs to a process and is back a little after its last thread has ended, and NVML sees that
 * from outside. build.py adds the functions that need do nothing.
 *
 * Environment: EMULATED_GPUS (2), EMULATED_GPU_MIB (81559), EMULATED_GPU_TABLE (file with what
 * processes hold).
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#undef cuDeviceTotalMem
#undef cuDevicePrimaryCtxRetain
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo
#undef cuGetProcAddress

#define NAME "Emulated H100 80GB HBM3"
#define CONTEXT_BYTES (500L << 20)
#define BUS 16 /* of the first GPU */
#define PAGE 4096UL
#define MOST_GPUS 16
#define MOST_HOLDERS 1024
#define BACK_NS 150000000LL /* memory is free so long after a process has ended */
#define CUDA_VERSION_HERE 13000

static long number(const char *name, long otherwise) {
  const char *given = getenv(name);
  return given && *given ? atol(given) : otherwise;
}
static long long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static int num_gpus(void) { return (int)number("EMULATED_GPUS", 2); }
static long total_bytes(void) { return number("EMULATED_GPU_MIB", 81559) << 20; }

/* ---- what processes hold of the GPUs: a table in a file that all of them map ---- */

typedef struct {
  int pid, gpu;
  long long started, ended_ns, bytes;
} Holder;

/* Returns when a process was started, in ticks; 0 if its last thread has ended. */
static long long start_of(int pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  int file = open(path, O_RDONLY);
  if (file < 0) return 0;
  ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  if (size <= 0) return 0;
  text[size] = 0;
  char *rest = strrchr(text, ')') + 2, state = *rest;
  long long value = 0, threads = 0;
  for (int field = 3; field <= 22; field++) {
    if (field == 20) threads = atoll(rest);
    if (field == 22) value = atoll(rest);
    rest = strchr(rest, ' ') + 1;
  }
  return state == 'Z' && threads <= 1 ? 0 : value;
}
static Holder *table(void) {
  static Holder *found;
  if (found) return found;
  const char *path = getenv("EMULATED_GPU_TABLE");
  int file = open(path ? path : "/dev/shm/emulated-gpus", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  size_t size = MOST_HOLDERS * sizeof(Holder);
  if (file < 0 || ftruncate(file, size)) abort();
  void *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) abort();
  return found = memory;
}
/* Returns whether a holder's memory is in use; forgets it some time after the process has ended. */
static int holds(Holder *holder) {
  if (!holder->pid) return 0;
  if (start_of(holder->pid) == holder->started) return 1;
  if (!holder->ended_ns) holder->ended_ns = now_ns();
  if (now_ns() - holder->ended_ns < BACK_NS) return 1;
  memset(holder, 0, sizeof *holder);
  return 0;
}
static long long used_bytes(int gpu) {
  long long sum = 0;
  for (Holder *h = table(); h < table() + MOST_HOLDERS; h++)
    if (h->pid && h->gpu == gpu && holds(h)) sum += h->bytes;
  return sum;
}
static Holder *holder_of(int gpu) {
  int pid = getpid();
  for (Holder *h = table(); h < table() + MOST_HOLDERS; h++)
    if (h->pid == pid && h->gpu == gpu && h->started == start_of(pid)) return h;
  for (Holder *h = table(); h < table() + MOST_HOLDERS; h++)
    if (!holds(h) && __sync_bool_compare_and_swap(&h->pid, 0, pid)) {
      h->gpu = gpu, h->started = start_of(pid), h->ended_ns = 0, h->bytes = 0;
      return h;
    }
  abort();
}

/* ---- this process: its GPUs, and whether it may use them ---- */

static int user, visible[MOST_GPUS], num_visible;
static __thread int current;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void uuid_of(int gpu, char *text) {
  sprintf(text, "GPU-%08x-0000-4000-8000-00000000e0e0", 0xe0 + gpu);
}
static int gpu_named(const char *name) {
  char uuid[64];
  for (int gpu = 0; gpu < num_gpus(); gpu++) {
    uuid_of(gpu, uuid);
    if (strncmp(name, "GPU-", 4) ? atoi(name) == gpu : !strncmp(name, uuid, strlen(name))) return gpu;
  }
  return -1;
}
/* Begins to use CUDA, once in a process. What a parent has begun, its child cannot use. */
static int begin(void) {
  if (user) return user == getpid() ? 0 : cudaErrorInitializationError;
  const char *names = getenv("CUDA_VISIBLE_DEVICES");
  if (!names)
    for (int gpu = 0; gpu < num_gpus(); gpu++) visible[num_visible++] = gpu;
  else {
    char *copy = strdup(names), *rest = copy, *name;
    while ((name = strsep(&rest, ",")) && *name && gpu_named(name) >= 0) visible[num_visible++] = gpu_named(name);
    free(copy);
  }
  user = getpid();
  return num_visible ? 0 : cudaErrorNoDevice;
}
/* Has a context on the current GPU, which takes memory. Returns an error, or 0. */
static int use(void) {
  int error = begin();
  if (error) return error;
  pthread_mutex_lock(&lock);
  Holder *mine = holder_of(visible[current]);
  if (!mine->bytes) mine->bytes = CONTEXT_BYTES;
  pthread_mutex_unlock(&lock);
  return 0;
}
static int take(int gpu, long bytes) {
  Holder *mine = holder_of(gpu);
  if (used_bytes(gpu) + bytes > total_bytes()) return 0;
  mine->bytes += bytes;
  return 1;
}

/* ---- memory: regions of the host's, sorted by address ---- */

enum { DEVICE = 1, PINNED, RESERVED };
typedef struct Region {
  struct Region *next;
  char *start;
  size_t bytes;
  int kind, gpu;
} Region;
static Region *regions;

static void *allocate(size_t bytes, int kind) {
  if (use()) return NULL;
  size_t whole = (bytes + PAGE) / PAGE * PAGE;
  pthread_mutex_lock(&lock);
  void *start = NULL;
  if (kind != DEVICE || take(visible[current], whole)) {
    start = mmap(0, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    Region *new = malloc(sizeof *new);
    *new = (Region){regions, start, whole, kind, visible[current]};
    regions = new;
  }
  pthread_mutex_unlock(&lock);
  return start;
}
static int release(void *start) {
  pthread_mutex_lock(&lock);
  for (Region **at = &regions; *at; at = &(*at)->next)
    if ((*at)->start == start) {
      Region *gone = *at;
      *at = gone->next;
      munmap(gone->start, gone->bytes);
      if (gone->kind == DEVICE) holder_of(gone->gpu)->bytes -= gone->bytes;
      free(gone);
      break;
    }
  pthread_mutex_unlock(&lock);
  return 0;
}
static Region *region_of(const void *pointer) {
  const char *p = pointer;
  for (Region *r = regions; r; r = r->next)
    if (p >= r->start && p < r->start + r->bytes) return r;
  return NULL;
}
static int fill(void *to, int value, size_t bytes) {
  int error = use();
  if (error) return error;
  char *first = (char *)(((size_t)to + PAGE - 1) / PAGE * PAGE), *last = (char *)(((size_t)to + bytes) / PAGE * PAGE);
  if (value || last <= first) return memset(to, value, bytes), 0;
  memset(to, 0, first - (char *)to);
  madvise(first, last - first, MADV_DONTNEED); /* zeros without taking memory */
  memset(last, 0, (char *)to + bytes - last);
  return 0;
}
static int copy(void *to, const void *from, size_t bytes) {
  int error = use();
  if (!error) memmove(to, from, bytes);
  return error;
}

/* ---- attributes of a GPU; what is not listed is 0 ---- */

static int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 227 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 228 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}

/* ---- CUDA's runtime ---- */

cudaError_t cudaGetDeviceCount(int *count) { int error = begin(); *count = num_visible; return error; }
cudaError_t cudaGetDevice(int *device) { *device = current; return begin(); }
cudaError_t cudaSetDevice(int device) {
  int error = begin();
  if (error) return error;
  if (device >= num_visible) return cudaErrorInvalidDevice;
  current = device;
  return use();
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME);
  p->totalGlobalMem = total_bytes(), p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32, p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->textureAlignment = 512;
  for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = i < 2 ? 1024 : 64, p->maxGridSize[i] = i ? 65535 : 2147483647;
  p->pciBusID = BUS + visible[device];
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
  return begin();
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { *value = attribute((int)which); return begin(); }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_HERE; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION_HERE; return 0; }
const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaErrorInitializationError ? "initialization error: used in a process forked from one that used CUDA" : "emulated error"; }
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:%02x:00.0", BUS + visible[device]); return begin(); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = one != other; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return 0; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  int error = use();
  if (error) return error;
  *total = total_bytes(), *left = *total - used_bytes(visible[current]);
  return 0;
}

cudaError_t cudaMalloc(void **p, size_t bytes) { int error = use(); if (error) return error; *p = allocate(bytes, DEVICE); return *p ? 0 : cudaErrorMemoryAllocation; }
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void *p) { int error = use(); return error ? error : release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) { *p = allocate(bytes, PINNED); return *p ? 0 : cudaErrorMemoryAllocation; }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  pthread_mutex_lock(&lock);
  Region *r = region_of(p);
  memset(a, 0, sizeof *a);
  a->type = !r ? cudaMemoryTypeUnregistered : r->kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  for (int i = 0; r && i < num_visible; i++) if (visible[i] == r->gpu) a->device = i;
  a->devicePointer = (void *)p, a->hostPointer = a->type == cudaMemoryTypeDevice ? NULL : (void *)p;
  pthread_mutex_unlock(&lock);
  return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { return copy(to, from, n); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) { return copy(to, from, n); }
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { return copy(to, from, n); }
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t s) {
  int error = use();
  for (size_t i = 0; i < height && !error; i++) error = copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
  return error;
}
cudaError_t cudaMemset(void *to, int value, size_t n) { return fill(to, value, n); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t s) { return fill(to, value, n); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { static char space[1 << 20]; *p = space; return 0; }

static size_t handles = 0x1000;
static void *handle(void) { return (void *)__sync_add_and_fetch(&handles, 16); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return use(); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return use(); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = handle(); return use(); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return 0; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *with) { call(with); return 0; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *with, unsigned flags) { call(s, 0, with); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = calloc(1, sizeof(long long)); return use(); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { *(long long *)e = now_ns(); return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = (*(long long *)b - *(long long *)a) / 1e6; return 0; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }

static int capturing;
static unsigned long long captures;
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) { capturing = 1, captures++; return 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) { capturing = 0, *graph = handle(); return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *is) { *is = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *is, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  cudaStreamIsCapturing(s, is);
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)16;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) { *e = handle(); return 0; }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) { if (!nodes) *count = 1; return 0; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t n, cudaGraphNode_t *nodes, cudaGraphEdgeData *edges, size_t *count) { *count = 0; return 0; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *kernel) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->binaryVersion = a->ptxVersion = 90, a->maxDynamicSharedSizeBytes = 227 << 10;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int size, size_t shared) { *n = 2; return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *kernel, int size, size_t shared, unsigned flags) { *n = 2; return 0; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = (cudaMemPool_t)16; return 0; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) { *(size_t *)value = 0; return 0; }
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return use(); }
cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *entry) { *kernel = (cudaKernel_t)entry; return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) { *kernel = (cudaKernel_t)entry; return 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) { return use(); }
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *a, void **b, unsigned c, enum cudaLibraryOption *d, void **e, unsigned f) { *library = handle(); return 0; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) { *kernel = handle(); return 0; }
void **__cudaRegisterFatBinary(void *code) { static void *space[4]; return space; }

static int nothing(void) { return 0; }
static int entry(const char *name, void **found) {
  void *self = dlopen("libcuda.so.1", RTLD_LAZY), *versioned = NULL;
  char second[128];
  snprintf(second, sizeof second, "%s_v2", name);
  if (self && !(versioned = dlsym(self, name))) versioned = dlsym(self, second);
  *found = versioned ? versioned : (void *)nothing;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *how) { if (how) *how = 0; return entry(name, found); }
cudaError_t cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags, enum cudaDriverEntryPointQueryResult *how) { if (how) *how = 0; return entry(name, found); }

/* ---- CUDA's driver ---- */

CUresult cuInit(unsigned flags) { return begin(); }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION_HERE; return 0; }
CUresult cuDeviceGetCount(int *count) { return (CUresult)cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return begin(); }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) { snprintf(name, size, NAME); return 0; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { *bytes = total_bytes(); return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { *value = attribute(which); return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)16; return begin(); }
CUresult cuCtxGetDevice(CUdevice *device) { *device = current; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)16; return use(); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = user == getpid(); return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *code) { *module = handle(); return use(); }
CUresult cuModuleLoad(CUmodule *module, const char *file) { *module = handle(); return use(); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *code, unsigned n, CUjit_option *options, void **values) { *module = handle(); return use(); }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = handle(); return 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) { *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0; return 0; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int size, size_t shared) { *n = 2; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) { *n = 66; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra) { return use(); }
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned shared, CUstream s, void **arguments, void **extra) { return use(); }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = cudaGetErrorString((cudaError_t)error); return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = p;
  else *(int *)value = 0;
  return 0;
}
CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *how) { if (how) *how = 0; return entry(name, found); }

/* Addresses and memory apart, as sleeping engines use them. A handle is the place of a block. */
typedef struct { long bytes; int gpu; } Block;
CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) { *bytes = 2 << 20; return 0; }
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t bytes, size_t align, CUdeviceptr at, unsigned long long f) { *p = (CUdeviceptr)allocate(bytes, RESERVED); return *p ? 0 : CUDA_ERROR_OUT_OF_MEMORY; }
CUresult cuMemAddressFree(CUdeviceptr p, size_t bytes) { return release((void *)p); }
CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t bytes, const CUmemAllocationProp *p, unsigned long long f) {
  int error = use();
  if (error) return error;
  Block *block = malloc(sizeof *block);
  *block = (Block){bytes, visible[p->location.id]};
  pthread_mutex_lock(&lock);
  error = take(block->gpu, bytes) ? 0 : CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_unlock(&lock);
  *h = (CUmemGenericAllocationHandle)block;
  return error;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
  Block *block = (Block *)h;
  pthread_mutex_lock(&lock);
  holder_of(block->gpu)->bytes -= block->bytes;
  pthread_mutex_unlock(&lock);
  free(block);
  return 0;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) { return madvise((void *)p, bytes, MADV_DONTNEED) ? CUDA_ERROR_INVALID_VALUE : 0; }

/* ---- cuBLAS ---- */

int cublasCreate_v2(void **h) { *h = handle(); return use(); }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtCreate(void **h) { *h = handle(); return use(); }
int cublasLtMatmulDescCreate(void **h, int a, int b) { *h = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **h, int a, unsigned long b, unsigned long c, long d) { *h = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **h) { *h = handle(); return 0; }
typedef struct { unsigned long algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, Heuristic *found, int *count) { memset(found, 0, sizeof *found); *count = 1; return 0; }

/* ---- NVML: a device's handle is its number and one; it counts all, whatever CUDA shows ---- */

#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define GPU(device) ((int)(long)(device) - 1)
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return error == NOT_FOUND ? "Not Found" : "emulated error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.0 (emulated)"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA_VERSION_HERE; return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = CUDA_VERSION_HERE; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = num_gpus(); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return index < (unsigned)num_gpus() ? 0 : 2; }
int nvmlDeviceGetHandleByUUID(const char *name, void **device) {
  char uuid[64];
  int gpu = gpu_named(name);
  if (gpu < 0 || (uuid_of(gpu, uuid), strcmp(uuid, name))) return NOT_FOUND; /* the whole of it only */
  *device = (void *)(long)(gpu + 1);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *name, void **device) {
  int gpu = strchr(name, ':') ? (int)strtol(strchr(name, ':') + 1, NULL, 16) - BUS : -1;
  *device = (void *)(long)(gpu + 1);
  return gpu >= 0 && gpu < num_gpus() ? 0 : NOT_FOUND;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = GPU(device); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { snprintf(text, size, NAME); return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { uuid_of(GPU(device), text); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9, *minor = 0; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *info) {
  info[0] = total_bytes(), info[2] = used_bytes(GPU(device)), info[1] = info[0] - info[2];
  return 0;
}
/* torch looks for these when memory is short; it does without. */
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return NOT_SUPPORTED; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return NOT_SUPPORTED; }
/* NVLink joins neighbours: 0 and 1, 2 and 3. */
int nvmlDeviceGetP2PStatus(void *one, void *other, int which, int *status) { *status = GPU(one) / 2 == GPU(other) / 2 ? 0 : 5; return 0; }
typedef struct { unsigned pid; unsigned long long bytes; unsigned a, b; } Process;
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, Process *found) {
  unsigned room = *count, n = 0;
  for (Holder *h = table(); h < table() + MOST_HOLDERS; h++)
    if (h->pid && h->gpu == GPU(device) && holds(h) && n++ < room) found[n - 1] = (Process){h->pid, h->bytes, -1, -1};
  *count = n;
  return n > room ? 7 : 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *found) { return nvmlDeviceGetComputeRunningProcesses(device, count, found); }
