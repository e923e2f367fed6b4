#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tell.h"

enum { MOST_WORDS = 1024, WORDS_BYTES = 65536 };

static const char HELP[] =
    "edge-run --model FILE --inputs FILE.npz [options]\n"
    "\n"
    "Runs a model through ONNX Runtime's C interface and prints one line of JSON.\n"
    "\n"
    "  --model FILE          the ONNX model\n"
    "  --inputs FILE.npz     its inputs, by name; NAME__000, NAME__001, ... for several vectors\n"
    "  --library FILE        libonnxruntime.so (default: libonnxruntime.so.1 of the system)\n"
    "  --expect FILE.npz     check the outputs against these, named as the inputs are\n"
    "  --tolerance NAME=ATOL[:RTOL[:SHARE]]\n"
    "                        how near output NAME must be; SHARE of its values must (default 1);\n"
    "                        without one, bits must be equal\n"
    "  --outputs FILE.npz    write the outputs of every vector\n"
    "  --warm-up N           calls before timing (default 1)\n"
    "  --runs N              timed calls, the vectors in turn (default 10)\n"
    "  --seconds S           go on with timed calls for S seconds at least\n"
    "  --limit S             stop timed calls after S seconds, but not before 3 of them\n"
    "  --requests            for every number N read from standard input, time N calls and print\n"
    "                        their line at once; ends with the input\n"
    "  --threads N           of one call (default 1)\n"
    "  --no-arena            without the runtime's own memory arena\n"
    "  --level N             graph optimisation: 0, 1, 2 or 99 (default 99, all)\n"
    "  --config KEY=VALUE    a session option\n"
    "  --status FILE         write the JSON there, too, also where the run fails; not after an\n"
    "                        instruction this CPU lacks, of which standard error and exit tell\n"
    "  @FILE                 more options, one word a line\n"
    "\n"
    "Exit: 0 done | 1 outputs differ | 2 usage | 3 bad model or inputs | 6 library missing or\n"
    "unfit, disk full, or an instruction this CPU lacks\n";

Options set = {.warm_up = 1, .runs = 10, .threads = 1, .level = 99, .limit = 1e6, .arena = 1};

long whole(const char *option, const char *text, long least) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno || value < least || value > 1000000000)
        fail(USAGE, "%s %s: expected a whole number of at least %ld", option, text, least);
    return value;
}

static double duration(const char *option, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value < 1e6))
        fail(USAGE, "%s %s: expected a number of seconds", option, text);
    return value;
}

static void read_words(const char *path, char **words, int *count, int depth);

void read_options(int count, char **words, int depth) {
    for (int k = 0; depth == 0 && k + 1 < count; k++) /* first, as it tells of the others */
        if (!strcmp(words[k], "--status")) status_file = words[k + 1];
    for (int k = 0; k < count; k++) {
        const char *word = words[k], *value = k + 1 < count ? words[k + 1] : NULL;
        if (*word == '@') {
            char *more[MOST_WORDS];
            int found = 0;
            read_words(word + 1, more, &found, depth);
            read_options(found, more, depth + 1);
            continue;
        }
        if (!strcmp(word, "--help")) {
            fputs(HELP, stdout);
            exit(0);
        }
        if (!strcmp(word, "--no-arena")) { set.arena = 0; continue; }
        if (!strcmp(word, "--requests")) { set.requests = 1; continue; }
        static const char *const known[] = {"--model", "--inputs", "--library", "--expect",
            "--outputs", "--status", "--warm-up", "--runs", "--threads", "--level", "--seconds",
            "--limit", "--config", "--tolerance"};
        size_t which = 0, all = sizeof known / sizeof *known;
        while (which < all && strcmp(word, known[which])) which++;
        if (which == all) fail(USAGE, "unknown option %s; see edge-run --help", word);
        if (!value) fail(USAGE, "%s needs a value", word);
        k++;
        switch (which) {
        case 0: set.model = value; break;
        case 1: set.inputs = value; break;
        case 2: set.library = value; break;
        case 3: set.expect = value; break;
        case 4: set.outputs = value; break;
        case 5: status_file = value; break;
        case 6: set.warm_up = whole(word, value, 0); break;
        case 7: set.runs = whole(word, value, 0); break;
        case 8: set.threads = whole(word, value, 1); break;
        case 9: set.level = whole(word, value, 0); break;
        case 10: set.seconds = duration(word, value); break;
        case 11: set.limit = duration(word, value); break;
        case 12:
            if (!strchr(value, '=') || set.config_count == MOST_CONFIGS)
                fail(USAGE, "--config %s: expected KEY=VALUE, at most %d", value, MOST_CONFIGS);
            set.configs[set.config_count++] = value;
            break;
        default:
            if (!strrchr(value, '=') || set.tolerance_count == MOST_TOLERANCES)
                fail(USAGE, "--tolerance %s: expected NAME=ATOL, at most %d", value,
                     MOST_TOLERANCES);
            set.tolerances[set.tolerance_count++] = value;
        }
    }
}

/* The lines of an option file; they live as long as the program. */
static void read_words(const char *path, char **words, int *count, int depth) {
    FILE *file = depth < 4 ? fopen(path, "rb") : NULL;
    if (!file) fail(USAGE, "the options in %s cannot be read", path);
    char *text = allocate(WORDS_BYTES + 1);
    size_t size = fread(text, 1, WORDS_BYTES, file);
    fclose(file);
    if (size == WORDS_BYTES) fail(USAGE, "%s has more than %d bytes", path, WORDS_BYTES);
    text[size] = 0;
    for (char *line = strtok(text, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        if (*count == MOST_WORDS) fail(USAGE, "%s has more than %d words", path, MOST_WORDS);
        words[(*count)++] = line;
    }
}
