"""Ed25519 verification (RFC 8032) in Python alone: public data only, so time may leak.

Strict: one signature has one spelling. S must be below the group order, both points must be
spelt canonically, and a key of small order, under which anything can be signed, is refused.
The equation is checked without the cofactor, [S]B = R + [k]A, as RFC 8032 5.1.7 allows and
most libraries do.
"""

import hashlib

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
WINDOW = 4  # bits of both scalars at once: 64 rounds of 4 doublings and 2 additions

Point = tuple[int, int, int, int]  # X, Y, Z, T with x = X/Z, y = Y/Z, xy = T/Z (RFC 8032, 5.1.4)
ZERO: Point = (0, 1, 1, 0)


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the 64-byte `signature` of `message` was made with the 32-byte public `key`."""
    if len(key) != 32 or len(signature) != 64:
        return False
    a, r = decode(key), decode(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= ORDER or small(a):
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % ORDER
    return equal(double_multiply(s, BASE, k, negative(a)), r)


def decode(data: bytes) -> Point | None:
    """The point that 32 bytes spell (RFC 8032, 5.1.3); None where they are not canonical."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (1 << 255) - 1
    if y >= P:
        return None
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    if (v * x * x - u) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (v * x * x - u) % P or (x == 0 and sign):
        return None
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


def add(p: Point, q: Point) -> Point:
    """The sum, complete: also of a point and itself (RFC 8032, 5.1.4)."""
    a = (p[1] - p[0]) * (q[1] - q[0]) % P
    b = (p[1] + p[0]) * (q[1] + q[0]) % P
    c = 2 * p[3] * q[3] * D % P
    d = 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def double(p: Point) -> Point:
    """Twice the point (RFC 8032, 5.1.4)."""
    a, b, c = p[0] * p[0] % P, p[1] * p[1] % P, 2 * p[2] * p[2] % P
    h = a + b
    e = h - (p[0] + p[1]) ** 2 % P
    g = a - b
    f = c + g
    return e * f % P, g * h % P, f * g % P, e * h % P


def negative(p: Point) -> Point:
    return -p[0] % P, p[1], p[2], -p[3] % P


def equal(p: Point, q: Point) -> bool:
    return not ((p[0] * q[2] - q[0] * p[2]) % P or (p[1] * q[2] - q[1] * p[2]) % P)


def small(p: Point) -> bool:
    """Whether the point's order divides 8."""
    return equal(double(double(double(p))), ZERO)


def multiples(p: Point) -> list[Point]:
    """0, 1, ... 2^WINDOW - 1 times a point."""
    table = [ZERO]
    for _ in range((1 << WINDOW) - 1):
        table.append(add(table[-1], p))
    return table


def double_multiply(s: int, p: Point, k: int, q: Point) -> Point:
    """[s]p + [k]q, both scalars below 2^253 (Straus's method)."""
    ps, qs = multiples(p), multiples(q)
    total, mask = ZERO, (1 << WINDOW) - 1
    for shift in range(252, -1, -WINDOW):
        for _ in range(WINDOW):
            total = double(total)
        total = add(add(total, ps[s >> shift & mask]), qs[k >> shift & mask])
    return total


def base_point() -> Point:
    """The generator: y = 4/5 and an even x (RFC 8032, 5.1)."""
    point = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    assert point is not None
    return point


BASE = base_point()
