/* The command line of edge-run. */
#ifndef EDGEWRIGHT_OPTIONS_H
#define EDGEWRIGHT_OPTIONS_H

#include <stddef.h>

enum { MOST_CONFIGS = 64, MOST_TOLERANCES = 256 };

typedef struct {
    const char *model, *inputs, *library, *expect, *outputs;
    long warm_up, runs, threads, level;
    double seconds, limit;
    int arena, requests;
    const char *configs[MOST_CONFIGS], *tolerances[MOST_TOLERANCES];
    size_t config_count, tolerance_count;
} Options;

extern Options set;

void read_options(int count, char **words, int depth);
long whole(const char *option, const char *text, long least); /* a number, or the end */

#endif
