/* What the program says: lines of JSON, and one line on standard error where it gives up. */
#ifndef EDGEWRIGHT_TELL_H
#define EDGEWRIGHT_TELL_H

#include <stddef.h>

enum { DIFFERENT = 1, USAGE = 2, BAD_INPUT = 3, ENVIRONMENT = 6 }; /* exit codes */

/* One line of JSON, grown as it is written. */
typedef struct {
    char *text;
    size_t used, room;
} Json;
extern Json json;
extern const char *status_file; /* also gets the last line; NULL for none */

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say_text(const char *text); /* quoted */
void tell(int last);

_Noreturn void fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
void *allocate(size_t bytes);

#endif
