"""JSON in the one spelling of RFC 8785, with the standard library only: a device reads it, too.

Python's own encoder already escapes strings as the RFC demands (section 3.2.2.2); what differs
is the order of keys (UTF-16 code units, 3.2.3) and the spelling of numbers (ECMAScript, 3.2.2.3).
"""

import json
from typing import Any

EXACT = 2**53 - 1  # whole numbers beyond are not the same in every reader


def dumps(value: Any) -> bytes:
    """The canonical bytes of a JSON value; ValueError where JSON has no spelling for it."""
    return spell(value).encode("utf-8")  # UnicodeEncodeError is a ValueError: half of a surrogate


def spell(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > EXACT:
            raise ValueError(f"a whole number beyond {EXACT}")
        return str(int(value))
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(spell(item) for item in value) + "]"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key that is no string")
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{spell(key)}:{spell(value[key])}" for key in keys) + "}"
    raise ValueError(f"a value of type {type(value).__name__}")


def number(value: float) -> str:
    """As ECMAScript's Number::toString: the shortest digits that read back, as `repr` finds them.

    Cases of ECMA-262, 6.1.6.1.20, with the digits s, their count k and the exponent n.
    """
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("a number that is not finite")
    if value == 0:
        return "0"
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    n = len(whole) + int(exponent or 0)
    s = (whole + fraction).lstrip("0")
    n -= len(whole + fraction) - len(s)
    s = s.rstrip("0")
    k = len(s)
    if k <= n <= 21:
        text = s + "0" * (n - k)
    elif 0 < n <= 21:
        text = f"{s[:n]}.{s[n:]}"
    elif -6 < n <= 0:
        text = "0." + "0" * -n + s
    else:
        text = f"{s[0]}{'.' if k > 1 else ''}{s[1:]}e{n - 1:+d}"
    return "-" + text if value < 0 else text
