/* One output against its golden value. */
#ifndef EDGEWRIGHT_CHECK_H
#define EDGEWRIGHT_CHECK_H

#include "npz.h"

typedef struct {
    double absolute, relative; /* |found - golden| <= absolute + relative * |golden| */
    double share;              /* of the values must hold that */
} Tolerance;

typedef struct {
    double largest; /* |found - golden| */
    int equal;      /* bit by bit */
    char fault[160]; /* empty where the output is near enough */
} Difference;

Difference compare(const Array *found, const Array *golden, Tolerance allowed);

#endif
