/* Arrays in .npz files: stored (not compressed), little-endian, C order, plain numbers.
 *
 * What numpy.savez writes, and what the golden vectors of a bundle are. A file that is anything
 * else ends the program through `fail` with a reason; no size in it is believed unchecked.
 */
#ifndef EDGEWRIGHT_NPZ_H
#define EDGEWRIGHT_NPZ_H

#include <stddef.h>
#include <stdint.h>

#define MAX_RANK 16

typedef struct {
    const char *descr; /* as numpy writes it */
    int type;          /* onnxruntime's number of the element type */
    size_t size;       /* bytes of one element */
} Dtype;

typedef struct {
    char *name;
    const Dtype *dtype;
    int64_t shape[MAX_RANK];
    size_t rank, count, bytes;
    const unsigned char *data;
} Array;

typedef struct {
    Array *items;
    size_t count;
} Arrays;

const Dtype *dtype_of_type(int type); /* NULL where numbers of that type cannot be passed on */
Arrays read_npz(const char *path);
const Array *find_array(const Arrays *arrays, const char *name, long vector);
void write_npz(const char *path, const Arrays *arrays);

#endif
