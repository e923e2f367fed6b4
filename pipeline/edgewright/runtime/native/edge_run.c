/* edge-run: runs a model through ONNX Runtime's C interface, without Python.
 *
 * Loads the library at run time, feeds arrays from an .npz file, checks the outputs against
 * golden ones, and times every call. `edge-run --help` tells the options and the exit codes.
 *
 * Two marker instructions, which do nothing on any CPU, stand around the call that runs the
 * model: the plug-in in edge_count.c counts what an emulated CPU executes between them.
 */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "npz.h"
#include "options.h"
#include "ort.h"
#include "tell.h"

enum { LEAST_CALLS = 3 }; /* whatever --limit says */

static Ort ort;

static void check(OrtStatus *status, int code, const char *doing) {
    if (!status) return;
    char text[1024];
    snprintf(text, sizeof text, "%s", ort.GetErrorMessage(status));
    ort.ReleaseStatus(status);
    fail(code, "%s: %s", doing, text);
}

static void on_illegal_instruction(int number) {
    static const char text[] =
        "edge-run: the runtime chose an instruction that this CPU lacks (SIGILL)\n";
    (void)!write(2, text, sizeof text - 1);
    (void)number;
    _exit(ENVIRONMENT);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long status_kib(const char *key) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long value = 0;
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key))) value = strtol(line + strlen(key), NULL, 10);
    if (file) fclose(file);
    return value;
}

/* ---- the session ---- */

typedef struct {
    OrtSession *session;
    char **input_names, **output_names;
    size_t input_count, output_count;
    OrtValue **feeds; /* vector by vector, in the order of input_names */
    long vectors;
} Model;

static const char *load_library(void) {
    void *library = NULL;
    const char *tried = set.library ? set.library : "libonnxruntime.so.1 or libonnxruntime.so";
    if (set.library) library = dlopen(set.library, RTLD_NOW | RTLD_LOCAL);
    else if (!(library = dlopen("libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL)))
        library = dlopen("libonnxruntime.so", RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(ENVIRONMENT, "%s cannot be loaded: %s", tried, dlerror());
    const OrtApiBase *(*base)(void);
    *(void **)&base = dlsym(library, "OrtGetApiBase");
    if (!base) fail(ENVIRONMENT, "%s is not ONNX Runtime: it has no OrtGetApiBase", tried);
    OrtTable table = base()->table(ORT_TABLE_VERSION);
    if (!table) fail(ENVIRONMENT, "ONNX Runtime %s is too old: expected 1.8 or later",
                     base()->version());
    ort = ort_functions(table);
    return base()->version();
}

static OrtSession *open_session(void) {
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    check(ort.CreateEnv(ORT_LOG_FATAL, "edge-run", &env), ENVIRONMENT, "starting the runtime");
    check(ort.CreateSessionOptions(&options), ENVIRONMENT, "starting the runtime");
    check(ort.SetSessionLogSeverityLevel(options, ORT_LOG_FATAL), ENVIRONMENT, "log level");
    check(ort.SetIntraOpNumThreads(options, (int)set.threads), USAGE, "--threads");
    check(ort.SetInterOpNumThreads(options, 1), USAGE, "--threads");
    check(ort.SetSessionGraphOptimizationLevel(options, (int)set.level), USAGE, "--level");
    if (!set.arena) check(ort.DisableCpuMemArena(options), USAGE, "--no-arena");
    for (size_t k = 0; k < set.config_count; k++) {
        const char *text = set.configs[k], *equals = strchr(text, '=');
        char *key = strndup(text, (size_t)(equals - text));
        check(ort.AddSessionConfigEntry(options, key, equals + 1), USAGE, "--config");
        free(key);
    }
    check(ort.CreateSession(env, set.model, options, &session), BAD_INPUT, set.model);
    return session;
}

/* Names of inputs and outputs, and a tensor around every input array. */
static void prepare(Model *model, const Arrays *inputs) {
    OrtAllocator *allocator;
    OrtMemoryInfo *memory;
    check(ort.GetAllocatorWithDefaultOptions(&allocator), ENVIRONMENT, "allocator");
    check(ort.CreateCpuMemoryInfo(ORT_DEVICE_ALLOCATOR, ORT_MEMORY_DEFAULT, &memory), ENVIRONMENT,
          "memory");
    check(ort.SessionGetInputCount(model->session, &model->input_count), BAD_INPUT, "inputs");
    check(ort.SessionGetOutputCount(model->session, &model->output_count), BAD_INPUT, "outputs");
    model->input_names = allocate((model->input_count + 1) * sizeof(char *));
    model->output_names = allocate((model->output_count + 1) * sizeof(char *));
    for (size_t k = 0; k < model->input_count; k++)
        check(ort.SessionGetInputName(model->session, k, allocator, &model->input_names[k]),
              BAD_INPUT, "names of inputs");
    for (size_t k = 0; k < model->output_count; k++)
        check(ort.SessionGetOutputName(model->session, k, allocator, &model->output_names[k]),
              BAD_INPUT, "names of outputs");

    size_t width = model->input_count;
    model->vectors = width ? (long)(inputs->count / width) : 1;
    if (model->vectors < 1 || (size_t)model->vectors * width != inputs->count)
        fail(BAD_INPUT, "%s has %zu arrays: expected as many for each of the %zu inputs",
             set.inputs, inputs->count, width);
    model->feeds = allocate(((size_t)model->vectors * width + 1) * sizeof(OrtValue *));
    for (long v = 0; v < model->vectors; v++)
        for (size_t k = 0; k < width; k++) {
            const Array *array = find_array(inputs, model->input_names[k], v);
            if (!array)
                fail(BAD_INPUT, "%s has no array '%s__%03ld' for the model's input", set.inputs,
                     model->input_names[k], v);
            check(ort.CreateTensorWithDataAsOrtValue(memory, (void *)array->data, array->bytes,
                                                     array->shape, array->rank,
                                                     array->dtype->type,
                                                     &model->feeds[(size_t)v * width + k]),
                  BAD_INPUT, array->name);
        }
}

/* In a function of its own, so that the plug-in sees it as a block of its own. */
static void __attribute__((noinline, noclone)) mark(void) {
#if defined(__aarch64__)
    __asm__ volatile(".inst 0xd5032fff" ::: "memory"); /* HINT #127 */
#elif defined(__x86_64__)
    __asm__ volatile(".byte 0x0f, 0x1f, 0x84, 0x00, 0x65, 0x64, 0x67, 0x65" ::: "memory"); /* NOP */
#endif
}

static OrtStatus *run(const Model *model, long vector, OrtValue **outputs) {
    const OrtValue *const *feeds =
        (const OrtValue *const *)(model->feeds + (size_t)vector * model->input_count);
    return ort.Run(model->session, NULL, (const char *const *)model->input_names, feeds,
                   model->input_count, (const char *const *)model->output_names,
                   model->output_count, outputs);
}

static void release(const Model *model, OrtValue **outputs) {
    for (size_t k = 0; k < model->output_count; k++)
        if (outputs[k]) ort.ReleaseValue(outputs[k]);
}

/* An output as an array that shares the value's memory. */
static Array output_array(OrtValue *value, const char *name) {
    Array array = {.name = (char *)name, .count = 1};
    int tensor = 0, type = 0;
    OrtTensorInfo *info;
    void *data;
    if (!value) fail(BAD_INPUT, "output '%s' has no value", name);
    check(ort.IsTensor(value, &tensor), BAD_INPUT, name);
    if (!tensor) fail(BAD_INPUT, "output '%s' is no tensor, which edge-run cannot pass on", name);
    check(ort.GetTensorTypeAndShape(value, &info), BAD_INPUT, name);
    check(ort.GetTensorElementType(info, &type), BAD_INPUT, name);
    check(ort.GetDimensionsCount(info, &array.rank), BAD_INPUT, name);
    if (array.rank > MAX_RANK) fail(BAD_INPUT, "output '%s' has %zu axes", name, array.rank);
    check(ort.GetDimensions(info, array.shape, array.rank), BAD_INPUT, name);
    ort.ReleaseTensorTypeAndShapeInfo(info);
    if (!(array.dtype = dtype_of_type(type)))
        fail(BAD_INPUT, "output '%s' holds no plain numbers (type %d)", name, type);
    for (size_t d = 0; d < array.rank; d++) array.count *= (size_t)array.shape[d];
    array.bytes = array.count * array.dtype->size;
    check(ort.GetTensorMutableData(value, &data), BAD_INPUT, name);
    array.data = data;
    return array;
}

/* ---- what is done with it ---- */

static Tolerance tolerance_of(const char *name) {
    Tolerance found = {0, 0, 1};
    for (size_t k = 0; k < set.tolerance_count; k++) {
        const char *text = set.tolerances[k], *equals = strrchr(text, '=');
        if ((size_t)(equals - text) != strlen(name) || strncmp(text, name, strlen(name))) continue;
        if (sscanf(equals + 1, "%lf:%lf:%lf", &found.absolute, &found.relative, &found.share) < 1)
            fail(USAGE, "--tolerance %s: expected ATOL[:RTOL[:SHARE]]", text);
    }
    return found;
}

/* Every vector once: outputs written, and checked where golden ones are given. Returns faults. */
static long prove(const Model *model) {
    Arrays expected = {NULL, 0}, written = {NULL, 0};
    if (set.expect) expected = read_npz(set.expect);
    size_t total = (size_t)model->vectors * model->output_count;
    OrtValue **outputs = allocate((total + 1) * sizeof(OrtValue *));
    memset(outputs, 0, (total + 1) * sizeof(OrtValue *));
    written.items = allocate((total + 1) * sizeof(Array));
    long faults = 0, checked = 0, equal = 0;
    double worst = 0;
    char first[512] = "";
    for (long v = 0; v < model->vectors; v++) {
        OrtValue **row = outputs + (size_t)v * model->output_count;
        check(run(model, v, row), BAD_INPUT, set.model);
        for (size_t k = 0; k < model->output_count; k++) {
            const char *name = model->output_names[k];
            Array found = output_array(row[k], name);
            if (set.expect) {
                const Array *golden = find_array(&expected, name, v);
                if (!golden)
                    fail(BAD_INPUT, "%s has no array '%s__%03ld'", set.expect, name, v);
                Difference d = compare(&found, golden, tolerance_of(name));
                checked++;
                equal += d.equal;
                if (d.largest > worst) worst = d.largest;
                if (d.fault[0] && !faults++)
                    snprintf(first, sizeof first, "output '%s' of vector %ld: %s", name, v,
                             d.fault);
            }
            found.name = allocate(strlen(name) + 32);
            sprintf(found.name, "%s__%03ld", name, v);
            written.items[written.count++] = found;
        }
    }
    if (set.outputs) write_npz(set.outputs, &written);
    release(&(Model){.output_count = total}, outputs);
    if (set.expect) {
        say(", \"checked\": {\"outputs\": %ld, \"equal\": %ld, \"faults\": %ld, \"worst\": %.9g",
            checked, equal, faults, worst < 1e300 ? worst : 1e300);
        say(", \"first\": ");
        say_text(first);
        say("}");
        if (faults) fprintf(stderr, "edge-run: %s (%ld of %ld outputs differ)\n", first, faults,
                            checked);
    }
    return faults;
}

/* Timed calls, at least `least` and for `seconds`; adds "wall_ns" and "cpu_ns" to the JSON. */
static void time_calls(const Model *model, long least, double seconds, long *turn) {
    size_t room = (size_t)least + 1024, count = 0;
    int64_t *times = allocate(2 * room * sizeof *times);
    OrtValue **outputs = allocate((model->output_count + 1) * sizeof(OrtValue *));
    int64_t begin = now_ns(CLOCK_MONOTONIC);
    for (;;) {
        double passed = (double)(now_ns(CLOCK_MONOTONIC) - begin) / 1e9;
        if ((long)count >= least && passed >= seconds) break;
        if (count >= LEAST_CALLS && passed >= set.limit) break;
        if (count == room) {
            int64_t *grown = allocate(4 * room * sizeof *times);
            memcpy(grown, times, 2 * room * sizeof *times);
            free(times);
            times = grown;
            room *= 2;
        }
        long vector = (*turn)++ % model->vectors;
        memset(outputs, 0, model->output_count * sizeof *outputs);
        int64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID), wall = now_ns(CLOCK_MONOTONIC);
        mark();
        OrtStatus *status = run(model, vector, outputs);
        mark();
        times[2 * count] = now_ns(CLOCK_MONOTONIC) - wall;
        times[2 * count + 1] = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        count++;
        check(status, BAD_INPUT, set.model);
        release(model, outputs);
    }
    for (int which = 0; which < 2; which++) {
        say("%s\"%s\": [", which || json.text[json.used - 1] != '{' ? ", " : "",
            which ? "cpu_ns" : "wall_ns");
        for (size_t k = 0; k < count; k++)
            say("%s%lld", k ? ", " : "", (long long)times[2 * k + (size_t)which]);
        say("]");
    }
    free(times);
    free(outputs);
}

int main(int count, char **words) {
    signal(SIGILL, on_illegal_instruction);
    setenv("ORT_DISABLE_TELEMETRY", "1", 0); /* see edgewright/__init__.py */
    read_options(count - 1, words + 1, 0);
    if (!set.model || !set.inputs) fail(USAGE, "--model and --inputs are needed; see --help");
    const char *version = load_library();
    Arrays inputs = read_npz(set.inputs);
    Model model = {0};
    long before = status_kib("VmRSS:");
    int64_t begin = now_ns(CLOCK_MONOTONIC);
    model.session = open_session();
    int64_t loaded = now_ns(CLOCK_MONOTONIC) - begin;
    prepare(&model, &inputs);

    say("{\"runtime\": ");
    say_text(version);
    say(", \"load_ns\": %lld, \"vectors\": %ld, \"threads\": %ld", (long long)loaded,
        model.vectors, set.threads);
    long faults = set.expect || set.outputs ? prove(&model) : 0, turn = 0;
    OrtValue **outputs = allocate((model.output_count + 1) * sizeof(OrtValue *));
    for (long k = 0; k < set.warm_up; k++) {
        memset(outputs, 0, model.output_count * sizeof *outputs);
        check(run(&model, turn++ % model.vectors, outputs), BAD_INPUT, set.model);
        release(&model, outputs);
    }
    if (set.requests) {
        char line[64];
        say(", \"ready\": true}");
        tell(0);
        while (fgets(line, sizeof line, stdin)) {
            line[strcspn(line, "\r\n")] = 0;
            say("{");
            time_calls(&model, whole("--requests", line, 1), 0, &turn);
            say("}");
            tell(0);
        }
        say("{\"done\": true");
    } else {
        time_calls(&model, set.runs, set.seconds, &turn);
    }
    say(", \"rss_before_load_kib\": %ld, \"peak_kib\": %ld, \"exit\": %d}", before,
        status_kib("VmHWM:"), faults ? DIFFERENT : 0);
    tell(1);
    ort.ReleaseSession(model.session);
    return faults ? DIFFERENT : 0;
}
