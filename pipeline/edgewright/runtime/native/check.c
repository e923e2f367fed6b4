#include "check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static double half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 0    ? ldexp(fraction, -24)
                   : exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -value : value;
}

static double number(const Array *array, size_t k) {
    const unsigned char *p = array->data + k * array->dtype->size;
#define AS(type)                                                                                   \
    do {                                                                                           \
        type value;                                                                                \
        memcpy(&value, p, sizeof value);                                                           \
        return (double)value;                                                                      \
    } while (0)
    switch (array->dtype->type) {
    case 1: AS(float);
    case 2:
    case 9: AS(uint8_t);
    case 3: AS(int8_t);
    case 4: AS(uint16_t);
    case 5: AS(int16_t);
    case 6: AS(int32_t);
    case 7: AS(int64_t);
    case 11: AS(double);
    case 12: AS(uint32_t);
    case 13: AS(uint64_t);
    default: break;
    }
#undef AS
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return half(bits);
}

Difference compare(const Array *found, const Array *golden, Tolerance allowed) {
    Difference d = {0, 0, ""};
    int same = found->rank == golden->rank && found->dtype == golden->dtype;
    for (size_t k = 0; same && k < found->rank; k++) same = found->shape[k] == golden->shape[k];
    if (!same) {
        d.largest = INFINITY;
        snprintf(d.fault, sizeof d.fault, "its type or shape differs: expected %s of %zu values, "
                 "found %s of %zu", golden->dtype->descr, golden->count, found->dtype->descr,
                 found->count);
        return d;
    }
    d.equal = !memcmp(found->data, golden->data, found->bytes);
    if (d.equal) return d;
    size_t near = 0;
    for (size_t k = 0; k < found->count; k++) {
        double a = number(found, k), b = number(golden, k), gap = fabs(a - b);
        if (a == b) gap = 0; /* infinities, too */
        if (isnan(gap)) gap = INFINITY;
        near += a == b || gap <= allowed.absolute + allowed.relative * fabs(b);
        if (gap > d.largest) d.largest = gap;
    }
    double share = (double)near / (double)found->count;
    if (share < allowed.share)
        snprintf(d.fault, sizeof d.fault, "%.2f %% of the values are near enough, required "
                 "%.2f %%; largest difference %.4g, allowed %.4g", 100 * share,
                 100 * allowed.share, d.largest, allowed.absolute);
    return d;
}
