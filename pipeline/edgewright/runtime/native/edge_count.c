/* A plug-in for QEMU's user mode: guest instructions between markers, by class of opcode.
 *
 *   qemu-aarch64 -plugin edge_count.so,out=FILE,arch=aarch64 ... PROGRAM
 *
 * Every time the program executes its marker (see mark() in edge_run.c), the counters are kept;
 * at the end they are written as JSON: {"classes": [names], "marks": [[one number per class]]}.
 * The sum of all classes is the number of instructions. A block of code is counted when it is
 * entered, so the marker must end in a block of its own, as it does in a small function.
 *
 * The prototypes are those of QEMU's plug-in interface, version 1, declared by hand: the emulator
 * of the distribution comes without its header, and the interface needs no library.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { QEMU_PLUGIN_CB_NO_REGS = 0, QEMU_PLUGIN_INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t,
                                           void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int op, void *counter,
                                              uint64_t add);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *,
                                            void (*)(unsigned cpu, void *), int flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { DOT, I8MM, MLAL, FMLA, SIMD, SVE, MEMORY, BRANCH, OTHER, CLASSES };
static const char *const NAMES[CLASSES] = {"dot",  "i8mm",   "mlal",   "fmla", "simd",
                                           "sve",  "memory", "branch", "other"};
enum { MOST_MARKS = 65536 };

static uint64_t counters[CLASSES];
static uint64_t (*marks)[CLASSES];
static size_t mark_count;
static const char *out_path;
static bool is_arm;

/* The class of an AArch64 instruction, by the tables of the architecture's manual. */
static int arm_class(uint32_t w) {
    if ((w & 0x1E000000) == 0x04000000 || (w & 0x9E000000) == 0x80000000) return SVE; /* or SME */
    if ((w & 0x0A000000) == 0x08000000) return MEMORY;
    if ((w & 0x1C000000) == 0x14000000) return BRANCH; /* and system, as hints and barriers */
    if ((w & 0x0E000000) != 0x0E000000) return OTHER;
    if ((w & 0x9FE0FC00) == 0x0E809400) return DOT;  /* SDOT, UDOT of vectors */
    if ((w & 0x9FC0F400) == 0x0F80E000) return DOT;  /* SDOT, UDOT by element */
    if ((w & 0xBFE0FC00) == 0x0E809C00) return I8MM; /* USDOT of vectors */
    if ((w & 0xBF40F400) == 0x0F00F000) return I8MM; /* USDOT, SUDOT by element */
    if ((w & 0xDFE0FC00) == 0x4E80A400) return I8MM; /* SMMLA, UMMLA */
    if ((w & 0xFFE0FC00) == 0x4E80AC00) return I8MM; /* USMMLA */
    /* Widening: SMLAL SMLSL SMULL, U..., of vectors and by element. */
    uint32_t vector = w & 0x9F20FC00, element = w & 0x9F00F400, size = w >> 22 & 3;
    if (size != 3 && (vector == 0x0E208000 || vector == 0x0E20A000 || vector == 0x0E20C000))
        return MLAL;
    if ((size == 1 || size == 2) &&
        (element == 0x0F002000 || element == 0x0F006000 || element == 0x0F00A000))
        return MLAL;
    if ((w & 0xBF20FC00) == 0x0E20CC00) return FMLA;                     /* FMLA FMLS, vectors */
    if ((w & 0xBF60FC00) == 0x0E400C00) return FMLA;                     /* of half precision */
    if ((w & 0xBF80B400) == 0x0F801000 || (w & 0xBFC0B400) == 0x0F001000) return FMLA; /* element */
    if ((w & 0xFF000000) == 0x1F000000) return FMLA; /* FMADD and its kin, of scalars */
    return SIMD;
}

static bool is_marker(const unsigned char *bytes, size_t size) {
    static const unsigned char arm[4] = {0xff, 0x2f, 0x03, 0xd5};
    static const unsigned char x86[8] = {0x0f, 0x1f, 0x84, 0x00, 0x65, 0x64, 0x67, 0x65};
    return is_arm ? size == 4 && !memcmp(bytes, arm, 4) : size == 8 && !memcmp(bytes, x86, 8);
}

static void on_marker(unsigned cpu, void *unused) {
    (void)cpu;
    (void)unused;
    if (mark_count < MOST_MARKS) memcpy(marks[mark_count++], counters, sizeof counters);
}

static void on_block(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    uint64_t found[CLASSES] = {0};
    (void)id;
    for (size_t k = 0; k < qemu_plugin_tb_n_insns(block); k++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(block, k);
        const unsigned char *bytes = qemu_plugin_insn_data(insn);
        size_t size = qemu_plugin_insn_size(insn);
        int class = OTHER;
        if (is_arm && size == 4)
            class = arm_class(bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
                              (uint32_t)bytes[3] << 24);
        found[class]++;
        if (is_marker(bytes, size))
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, QEMU_PLUGIN_CB_NO_REGS, NULL);
    }
    for (int k = 0; k < CLASSES; k++)
        if (found[k])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64,
                                                     &counters[k], found[k]);
}

static void write_counts(qemu_plugin_id_t id, void *unused) {
    FILE *file = fopen(out_path, "w");
    (void)id;
    (void)unused;
    if (!file) return; /* whoever waits for the file sees that it is not there */
    fputs("{\"classes\": [", file);
    for (int k = 0; k < CLASSES; k++) fprintf(file, "%s\"%s\"", k ? ", " : "", NAMES[k]);
    fputs("], \"marks\": [", file);
    for (size_t m = 0; m < mark_count; m++) {
        fputs(m ? ",\n[" : "\n[", file);
        for (int k = 0; k < CLASSES; k++)
            fprintf(file, "%s%llu", k ? ", " : "", (unsigned long long)marks[m][k]);
        fputs("]", file);
    }
    fputs("]}\n", file);
    fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int count,
                               char **words) {
    (void)info;
    for (int k = 0; k < count; k++) {
        if (!strncmp(words[k], "out=", 4)) out_path = strdup(words[k] + 4);
        if (!strcmp(words[k], "arch=aarch64")) is_arm = true;
    }
    marks = calloc(MOST_MARKS, sizeof *marks);
    if (!out_path || !marks) return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    qemu_plugin_register_atexit_cb(id, write_counts, NULL);
    return 0;
}
