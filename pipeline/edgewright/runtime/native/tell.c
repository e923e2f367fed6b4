#include "tell.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Json json;
const char *status_file;

void say(const char *format, ...) {
    va_list arguments;
    for (;;) {
        va_start(arguments, format);
        int size = vsnprintf(json.text + json.used, json.room - json.used, format, arguments);
        va_end(arguments);
        if (size < 0) return;
        if (json.used + (size_t)size < json.room) {
            json.used += (size_t)size;
            return;
        }
        json.room = 2 * json.room + (size_t)size + 256;
        char *grown = realloc(json.text, json.room);
        if (!grown) _exit(ENVIRONMENT);
        json.text = grown;
    }
}

/* The text with '?' for what would break a line or is no UTF-8: names come from files. */
static char *cleaned(const char *text) {
    char *copy = strdup(text);
    if (!copy) _exit(ENVIRONMENT);
    const unsigned char *p = (const unsigned char *)copy;
    while (*p) {
        int more = *p < 0x80 ? 0 : *p < 0xE0 ? 1 : *p < 0xF0 ? 2 : 3; /* bytes that must follow */
        if ((*p >= 0x80 && *p < 0xC2) || *p > 0xF4) more = -1;
        for (int k = 1; k <= more; k++)
            if ((p[k] & 0xC0) != 0x80) more = -1;
        if (*p < 32 || *p == 127 || more < 0) {
            copy[p - (const unsigned char *)copy] = *p == '\n' ? ' ' : '?';
            more = 0;
        }
        p += 1 + more;
    }
    return copy;
}

void say_text(const char *text) {
    char *clean = cleaned(text);
    say("\"");
    for (const char *p = clean; *p; p++) say(*p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
    say("\"");
    free(clean);
}

/* The JSON so far as one line on standard output and, for the last line, in the status file. */
void tell(int last) {
    fwrite(json.text, 1, json.used, stdout);
    fputc('\n', stdout);
    fflush(stdout);
    if (last && status_file) {
        char part[4096];
        snprintf(part, sizeof part, "%s.part", status_file);
        FILE *file = fopen(part, "wb");
        int good = file && fwrite(json.text, 1, json.used, file) == json.used;
        good = file && fputc('\n', file) != EOF && good;
        if (file && fclose(file)) good = 0;
        if (!good || rename(part, status_file)) {
            unlink(part);
            fprintf(stderr, "edge-run: the status file %s could not be written\n", status_file);
            exit(ENVIRONMENT);
        }
    }
    json.used = 0;
}

_Noreturn void fail(int code, const char *format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char *clean = cleaned(text);
    fprintf(stderr, "edge-run: %s\n", clean);
    json.used = 0;
    say("{\"error\": ");
    say_text(clean);
    free(clean);
    say(", \"exit\": %d}", code);
    tell(1);
    exit(code);
}

/* Memory on a cache line of its own; never NULL. */
void *allocate(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) fail(ENVIRONMENT, "out of memory");
    return memory;
}
