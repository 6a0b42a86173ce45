// CUDA's runtime and driver for a device that is not there. Its memory is the host's, its streams are empty, and its
// kernels do nothing: pretend.py computes what they would. Preloaded as libcuda.so.1, so that torch looks no further.
// What is not here is the real library's, and fails for want of a driver.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

const size_t kMemory = size_t(8) << 30;

std::mutex mutex;
std::map<char *, size_t> pinned, allocated;  // begin and size of each piece of memory
size_t taken = 0;
size_t handles = 0;  // streams and events are told apart by a number, and are never looked into

cudaError_t take(std::map<char *, size_t> &pieces, void **pointer, size_t size) {
    const size_t page = 4096;
    *pointer = std::aligned_alloc(page, (size / page + 1) * page);
    if (*pointer == nullptr) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> lock(mutex);
    pieces[static_cast<char *>(*pointer)] = size;
    return cudaSuccess;
}

size_t give_back(std::map<char *, size_t> &pieces, void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    auto piece = pieces.find(static_cast<char *>(pointer));
    if (piece == pieces.end()) return 0;
    size_t size = piece->second;
    pieces.erase(piece);
    std::free(pointer);
    return size;
}

bool holds(const std::map<char *, size_t> &pieces, const void *pointer) {
    const char *place = static_cast<const char *>(pointer);
    auto after = pieces.upper_bound(const_cast<char *>(place));
    if (after == pieces.begin()) return false;
    --after;
    return place < after->first + after->second;
}

template <typename Handle>
cudaError_t new_handle(Handle *handle) {
    std::lock_guard<std::mutex> lock(mutex);
    *handle = reinterpret_cast<Handle>(++handles * 16);
    return cudaSuccess;
}

int primary_context_state(int, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

int driver_does_nothing() { return 0; }

}  // namespace

#define DOES_NOTHING(name, ...) \
    cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    std::memset(properties, 0, sizeof *properties);
    std::strcpy(properties->name, "Pretended GPU");
    properties->major = 9;
    properties->totalGlobalMem = kMemory;
    properties->multiProcessorCount = 1;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = properties->maxThreadsPerMultiProcessor = 1024;
    properties->sharedMemPerBlock = properties->sharedMemPerBlockOptin = 1 << 16;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 1 << 16;
    for (int i = 0; i < 3; i++) properties->maxGridSize[i] = properties->maxThreadsDim[i] = 1024;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int) { return std::strncpy(id, "0000:00:00.0", size), cudaSuccess; }

cudaError_t cudaMalloc(void **pointer, size_t size) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (taken + size > kMemory) return cudaErrorMemoryAllocation;
        taken += size;
    }
    return take(allocated, pointer, size);
}
cudaError_t cudaFree(void *pointer) { return taken -= give_back(allocated, pointer), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *free = kMemory - taken, *total = kMemory, cudaSuccess; }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) { return take(pinned, pointer, size); }
cudaError_t cudaFreeHost(void *pointer) { return give_back(pinned, pointer), cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    std::memset(attributes, 0, sizeof *attributes);
    attributes->type = holds(pinned, pointer)      ? cudaMemoryTypeHost
                       : holds(allocated, pointer) ? cudaMemoryTypeDevice
                                                   : cudaMemoryTypeUnregistered;
    attributes->devicePointer = attributes->hostPointer = const_cast<void *>(pointer);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t) {
    return std::memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    return std::memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return std::memset(to, value, size), cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t) {
    return std::memset(to, value, size), cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return new_handle(stream); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return new_handle(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) { return *milliseconds = 1, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *, cudaGraph_t *,
                                     const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *,
                                        cudaGraph_t *, const cudaGraphNode_t **, size_t *) {
#endif
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) { return new_handle(pool); }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
    bool state = !std::strcmp(name, "cuDevicePrimaryCtxGetState");
    *function = state ? reinterpret_cast<void *>(primary_context_state) : reinterpret_cast<void *>(driver_does_nothing);
    if (result != nullptr) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

DOES_NOTHING(cudaSetDevice, int)
DOES_NOTHING(cudaDeviceSynchronize)
DOES_NOTHING(cudaGetLastError)
DOES_NOTHING(cudaPeekAtLastError)
DOES_NOTHING(cudaStreamDestroy, cudaStream_t)
DOES_NOTHING(cudaStreamQuery, cudaStream_t)
DOES_NOTHING(cudaStreamSynchronize, cudaStream_t)
DOES_NOTHING(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
DOES_NOTHING(cudaEventDestroy, cudaEvent_t)
DOES_NOTHING(cudaEventQuery, cudaEvent_t)
DOES_NOTHING(cudaEventRecord, cudaEvent_t, cudaStream_t)
DOES_NOTHING(cudaEventRecordWithFlags, cudaEvent_t, cudaStream_t, unsigned)
DOES_NOTHING(cudaEventSynchronize, cudaEvent_t)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode *)
DOES_NOTHING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void *)
DOES_NOTHING(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, cudaMemcpyKind)
DOES_NOTHING(cudaHostRegister, void *, size_t, unsigned)
DOES_NOTHING(cudaHostUnregister, void *)
DOES_NOTHING(cudaLaunchKernel, const void *, dim3, dim3, void **, size_t, cudaStream_t)
DOES_NOTHING(cudaLaunchKernelExC, const cudaLaunchConfig_t *, const void *, void **)
DOES_NOTHING(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return primary_context_state(device, flags, active);
}
int cuInit(unsigned) { return 0; }
}
