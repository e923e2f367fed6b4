#include "npz.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tell.h"

static const Dtype DTYPES[] = {
    {"<f4", 1, 4},  {"|u1", 2, 1},  {"|i1", 3, 1},  {"<u2", 4, 2},  {"<i2", 5, 2},  {"<i4", 6, 4},
    {"<i8", 7, 8},  {"|b1", 9, 1},  {"<f2", 10, 2}, {"<f8", 11, 8}, {"<u4", 12, 4}, {"<u8", 13, 8},
};

const Dtype *dtype_of_type(int type) {
    for (size_t k = 0; k < sizeof DTYPES / sizeof *DTYPES; k++)
        if (DTYPES[k].type == type) return &DTYPES[k];
    return NULL;
}

/* Little-endian numbers of a zip file. */
static uint32_t u16(const unsigned char *p) { return p[0] | (uint32_t)p[1] << 8; }
static uint32_t u32(const unsigned char *p) { return u16(p) | u16(p + 2) << 16; }

static void *map_file(const char *path, size_t *size) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (file < 0 || fstat(file, &info) || !S_ISREG(info.st_mode))
        fail(BAD_INPUT, "%s cannot be read: expected a file of arrays (.npz)", path);
    *size = (size_t)info.st_size;
    if (*size < 22) fail(BAD_INPUT, "%s is no .npz file: it has only %zu bytes", path, *size);
    void *bytes = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes == MAP_FAILED) fail(ENVIRONMENT, "%s cannot be mapped into memory", path);
    close(file);
    return bytes;
}

/* The text after `'key':` in the header of an array. */
static const char *header_value(const char *header, const char *key, const char *path,
                                const char *name) {
    const char *found = strstr(header, key);
    if (!found) fail(BAD_INPUT, "%s: array '%s' has no %s in its header", path, name, key);
    for (found += strlen(key); *found == ' ' || *found == ':'; found++) {
    }
    return found;
}

/* One .npy file of `size` bytes. */
static Array parse_npy(const unsigned char *bytes, size_t size, char *name, const char *path) {
    Array array = {.name = name, .count = 1};
    if (size < 12 || memcmp(bytes, "\x93NUMPY", 6))
        fail(BAD_INPUT, "%s: '%s' is no numpy array", path, name);
    size_t skip = bytes[6] == 1 ? 10 : 12, length = bytes[6] == 1 ? u16(bytes + 8) : u32(bytes + 8);
    if (length > size - skip || length > 65536)
        fail(BAD_INPUT, "%s: array '%s' is cut off in its header", path, name);
    char *header = allocate(length + 1);
    memcpy(header, bytes + skip, length);
    header[length] = 0;

    const char *descr = header_value(header, "'descr'", path, name);
    for (size_t k = 0; k < sizeof DTYPES / sizeof *DTYPES && !array.dtype; k++)
        if (*descr == '\'' && !strncmp(descr + 1, DTYPES[k].descr, 3) && descr[4] == '\'')
            array.dtype = &DTYPES[k];
    if (!array.dtype)
        fail(BAD_INPUT, "%s: array '%s' is %.8s: expected little-endian numbers", path, name,
             descr);
    if (strncmp(header_value(header, "'fortran_order'", path, name), "False", 5))
        fail(BAD_INPUT, "%s: array '%s' is in Fortran order: expected C order", path, name);
    const char *shape = header_value(header, "'shape'", path, name);
    for (shape += *shape == '('; *shape && *shape != ')';) {
        if (*shape == ',' || *shape == ' ') {
            shape++;
            continue;
        }
        char *end;
        long long dim = strtoll(shape, &end, 10);
        if (end == shape || dim < 0 || array.rank == MAX_RANK ||
            __builtin_mul_overflow(array.count, (size_t)dim, &array.count))
            fail(BAD_INPUT, "%s: array '%s' has a shape that cannot be", path, name);
        array.shape[array.rank++] = dim;
        shape = end;
    }
    free(header);
    if (__builtin_mul_overflow(array.count, array.dtype->size, &array.bytes) ||
        array.bytes != size - skip - length)
        fail(BAD_INPUT, "%s: array '%s' has %zu bytes, its shape wants %zu", path, name,
             size - skip - length, array.bytes);
    unsigned char *data = allocate(array.bytes + 1); /* aligned, unlike the file's own bytes */
    memcpy(data, bytes + skip + length, array.bytes);
    array.data = data;
    return array;
}

Arrays read_npz(const char *path) {
    size_t size;
    const unsigned char *file = map_file(path, &size), *end = NULL;
    size_t reach = size < 22 + 65535 ? size : 22 + 65535; /* a comment may follow the end */
    for (size_t back = 22; back <= reach && !end; back++)
        if (u32(file + size - back) == 0x06054b50) end = file + size - back;
    if (!end) fail(BAD_INPUT, "%s is no .npz file: it has no list of its members", path);
    size_t count = u16(end + 10), at = u32(end + 16);
    Arrays arrays = {allocate((count + 1) * sizeof(Array)), count};
    for (size_t k = 0; k < count; k++) {
        const unsigned char *entry = file + at;
        if (at + 46 > size || u32(entry) != 0x02014b50)
            fail(BAD_INPUT, "%s is damaged: member %zu is missing in its list", path, k);
        size_t name_length = u16(entry + 28), packed = u32(entry + 20), local = u32(entry + 42);
        if (u16(entry + 10))
            fail(BAD_INPUT, "%s is compressed: write it with numpy.savez", path);
        if (at + 46 + name_length > size || local + 30 > size)
            fail(BAD_INPUT, "%s is damaged: member %zu lies outside", path, k);
        char *name = allocate(name_length + 1);
        memcpy(name, entry + 46, name_length);
        name[name_length] = 0;
        if (name_length > 4 && !strcmp(name + name_length - 4, ".npy")) name[name_length - 4] = 0;
        size_t data = local + 30 + u16(file + local + 26) + u16(file + local + 28);
        if (data > size || packed > size - data)
            fail(BAD_INPUT, "%s is damaged: '%s' lies outside", path, name);
        arrays.items[k] = parse_npy(file + data, packed, name, path);
        at += 46 + name_length + u16(entry + 30) + u16(entry + 32);
    }
    munmap((void *)file, size);
    return arrays;
}

/* The array `name`, or `name__000` for vector 0 and so on; NULL where there is none. */
const Array *find_array(const Arrays *arrays, const char *name, long vector) {
    size_t length = strlen(name);
    for (size_t k = 0; k < arrays->count; k++) {
        const char *own = arrays->items[k].name;
        if (strncmp(own, name, length)) continue;
        char suffix[32];
        snprintf(suffix, sizeof suffix, "__%03ld", vector);
        if (!strcmp(own + length, suffix) || (vector == 0 && !own[length]))
            return &arrays->items[k];
    }
    return NULL;
}

static uint32_t crc32_of(uint32_t crc, const unsigned char *bytes, size_t size) {
    crc = ~crc;
    for (size_t k = 0; k < size; k++) {
        crc ^= bytes[k];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
    }
    return ~crc;
}

static unsigned char *put16(unsigned char *p, size_t v) {
    *p++ = (unsigned char)v;
    *p++ = (unsigned char)(v >> 8);
    return p;
}
static unsigned char *put32(unsigned char *p, size_t v) { return put16(put16(p, v), v >> 16); }

static size_t npy_header(char *text, size_t room, const Array *array) {
    char shape[MAX_RANK * 22 + 4] = "";
    size_t used = 0;
    for (size_t d = 0; d < array->rank; d++)
        used += (size_t)snprintf(shape + used, sizeof shape - used, "%lld,%s",
                                 (long long)array->shape[d], d + 1 < array->rank ? " " : "");
    if (array->rank > 1) shape[used - 1] = 0;
    memcpy(text, "\x93NUMPY\x01\x00\x00\x00", 10);
    size_t size = 10 + (size_t)snprintf(text + 10, room - 10,
                                        "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }",
                                        array->dtype->descr, shape);
    while (size % 64 != 63) text[size++] = ' ';
    text[size++] = '\n';
    put16((unsigned char *)text + 8, size - 10);
    return size;
}

void write_npz(const char *path, const Arrays *arrays) {
    FILE *file = fopen(path, "wb");
    if (!file) fail(ENVIRONMENT, "%s cannot be written", path);
    size_t at = 0, list_size = 0, list_room = 22;
    for (size_t k = 0; k < arrays->count; k++) list_room += 50 + strlen(arrays->items[k].name);
    unsigned char *list = allocate(list_room), head[30];
    int good = 1;
    for (size_t k = 0; k < arrays->count; k++) {
        const Array *array = &arrays->items[k];
        char header[1024];
        size_t head_size = npy_header(header, sizeof header - 64, array);
        size_t size = head_size + array->bytes, name = strlen(array->name) + 4;
        if (at + size + name + 30 > UINT32_MAX) fail(BAD_INPUT, "%s would exceed 4 GiB", path);
        uint32_t crc = crc32_of(0, (unsigned char *)header, head_size);
        crc = crc32_of(crc, array->data, array->bytes);
        /* Version 2.0, no flags, stored, 1980-01-01: the fields both records share. */
        unsigned char common[26], *p = common;
        p = put16(put16(put16(p, 20), 0), 0);
        p = put32(put16(put16(p, 0), 0x21), crc);
        p = put16(put16(put32(put32(p, size), size), name), 0);
        memcpy(put32(head, 0x04034b50), common, 26);
        good &= fwrite(head, 1, 30, file) == 30;
        good &= fprintf(file, "%s.npy", array->name) == (int)name;
        good &= fwrite(header, 1, head_size, file) == head_size;
        good &= fwrite(array->data, 1, array->bytes, file) == array->bytes;
        p = put16(put32(list + list_size, 0x02014b50), 20);
        memcpy(p, common, 26);
        p = put32(put32(put16(put16(put16(p + 26, 0), 0), 0), 0), at);
        memcpy(p, array->name, name - 4);
        memcpy(p + name - 4, ".npy", 4);
        list_size += 46 + name;
        at += 30 + name + size;
    }
    unsigned char *p = put32(list + list_size, 0x06054b50);
    p = put16(put16(put32(p, 0), arrays->count), arrays->count);
    put16(put32(put32(p, list_size), at), 0);
    list_size += 22;
    good &= fwrite(list, 1, list_size, file) == list_size;
    good &= fclose(file) == 0;
    free(list);
    if (!good) fail(ENVIRONMENT, "%s could not be written whole; is the disk full?", path);
}
