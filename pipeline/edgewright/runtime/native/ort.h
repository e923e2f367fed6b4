/* The few parts of ONNX Runtime's C interface that the runner calls, declared by hand.
 *
 * The library has one entry point, OrtGetApiBase. It hands out a table of functions whose order
 * never changes: new ones are appended (onnxruntime asserts the sizes of the old versions in its
 * own build). So a table of pointers and the places in it are enough, and no header is needed.
 */
#ifndef EDGEWRIGHT_ORT_H
#define EDGEWRIGHT_ORT_H

#include <stddef.h>
#include <stdint.h>

#define ORT_TABLE_VERSION 8 /* the first that has all below is 5; any later library gives it */

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorInfo OrtTensorInfo;

typedef void *const *OrtTable;
typedef struct {
    OrtTable (*table)(uint32_t version);
    const char *(*version)(void);
} OrtApiBase;

/* name, place in the table, type of the result, arguments */
#define ORT_FUNCTIONS(F)                                                                           \
    F(GetErrorMessage, 2, const char *, (const OrtStatus *))                                       \
    F(CreateEnv, 3, OrtStatus *, (int level, const char *name, OrtEnv **))                         \
    F(CreateSession, 7, OrtStatus *,                                                               \
      (const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **))                \
    F(Run, 9, OrtStatus *,                                                                         \
      (OrtSession *, const void *options, const char *const *inputs, const OrtValue *const *feeds, \
       size_t feed_count, const char *const *outputs, size_t output_count, OrtValue **))           \
    F(CreateSessionOptions, 10, OrtStatus *, (OrtSessionOptions **))                               \
    F(DisableCpuMemArena, 19, OrtStatus *, (OrtSessionOptions *))                                  \
    F(SetSessionLogSeverityLevel, 22, OrtStatus *, (OrtSessionOptions *, int))                     \
    F(SetSessionGraphOptimizationLevel, 23, OrtStatus *, (OrtSessionOptions *, int))               \
    F(SetIntraOpNumThreads, 24, OrtStatus *, (OrtSessionOptions *, int))                           \
    F(SetInterOpNumThreads, 25, OrtStatus *, (OrtSessionOptions *, int))                           \
    F(SessionGetInputCount, 30, OrtStatus *, (const OrtSession *, size_t *))                       \
    F(SessionGetOutputCount, 31, OrtStatus *, (const OrtSession *, size_t *))                      \
    F(SessionGetInputName, 36, OrtStatus *, (const OrtSession *, size_t, OrtAllocator *, char **)) \
    F(SessionGetOutputName, 37, OrtStatus *,                                                       \
      (const OrtSession *, size_t, OrtAllocator *, char **))                                       \
    F(CreateTensorWithDataAsOrtValue, 49, OrtStatus *,                                             \
      (const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *shape, size_t rank,         \
       int type, OrtValue **))                                                                     \
    F(IsTensor, 50, OrtStatus *, (const OrtValue *, int *))                                        \
    F(GetTensorMutableData, 51, OrtStatus *, (OrtValue *, void **))                                \
    F(GetTensorElementType, 60, OrtStatus *, (const OrtTensorInfo *, int *))                       \
    F(GetDimensionsCount, 61, OrtStatus *, (const OrtTensorInfo *, size_t *))                      \
    F(GetDimensions, 62, OrtStatus *, (const OrtTensorInfo *, int64_t *, size_t))                  \
    F(GetTensorTypeAndShape, 65, OrtStatus *, (const OrtValue *, OrtTensorInfo **))                \
    F(CreateCpuMemoryInfo, 69, OrtStatus *, (int allocator, int kind, OrtMemoryInfo **))           \
    F(GetAllocatorWithDefaultOptions, 78, OrtStatus *, (OrtAllocator **))                          \
    F(ReleaseStatus, 93, void, (OrtStatus *))                                                      \
    F(ReleaseSession, 95, void, (OrtSession *))                                                    \
    F(ReleaseValue, 96, void, (OrtValue *))                                                        \
    F(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorInfo *))                                  \
    F(AddSessionConfigEntry, 130, OrtStatus *,                                                     \
      (OrtSessionOptions *, const char *key, const char *value))

typedef struct {
#define ORT_MEMBER(name, place, result, arguments) result(*name) arguments;
    ORT_FUNCTIONS(ORT_MEMBER)
#undef ORT_MEMBER
} Ort;

static inline Ort ort_functions(OrtTable table) {
    Ort ort;
#define ORT_FILL(name, place, result, arguments) ort.name = (result(*) arguments)table[place];
    ORT_FUNCTIONS(ORT_FILL)
#undef ORT_FILL
    return ort;
}

enum { ORT_LOG_FATAL = 4, ORT_DEVICE_ALLOCATOR = 0, ORT_MEMORY_DEFAULT = 0 };

#endif
