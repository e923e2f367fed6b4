"""RFC 8785 without a library, against the library and the RFC's own examples."""

import json
import math
import struct

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.bundle import canonical

# Appendix B of RFC 8785: the bits of a double and its spelling.
NUMBERS = [
    ("0000000000000000", "0"),
    ("8000000000000000", "0"),
    ("0000000000000001", "5e-324"),
    ("8000000000000001", "-5e-324"),
    ("7fefffffffffffff", "1.7976931348623157e+308"),
    ("ffefffffffffffff", "-1.7976931348623157e+308"),
    ("4340000000000000", "9007199254740992"),
    ("c340000000000000", "-9007199254740992"),
    ("4430000000000000", "295147905179352830000"),
    ("44b52d02c7e14af5", "9.999999999999997e+22"),
    ("44b52d02c7e14af6", "1e+23"),
    ("44b52d02c7e14af7", "1.0000000000000001e+23"),
    ("444b1ae4d6e2ef4e", "999999999999999700000"),
    ("444b1ae4d6e2ef4f", "999999999999999900000"),
    ("444b1ae4d6e2ef50", "1e+21"),
    ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
    ("3eb0c6f7a0b5ed8d", "0.000001"),
    ("41b3de4355555553", "333333333.3333332"),
    ("41b3de4355555557", "333333333.33333343"),
    ("becbf647612f3696", "-0.0000033333333333333333"),
    ("43143ff3c1cb0959", "1424953923781206.2"),
]


@pytest.mark.parametrize(("bits", "text"), NUMBERS)
def test_numbers_of_the_rfc(bits, text):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical.dumps(value).decode() == text


def test_keys_and_strings_of_the_rfc():
    # Section 3.2.3: the order is that of UTF-16 code units, so U+1F600 comes before U+FB33.
    keys = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7}
    order = ["\r", "1", "\x80", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(json.loads(canonical.dumps(keys))) == order
    text = '\u20ac$\x0f\nA\'B"\\\\"/\x7f'
    assert canonical.dumps(text).decode() == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f"'


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-canonical.EXACT, canonical.EXACT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_as_the_library_spells_it(value):
    assert canonical.dumps(value) == rfc8785.dumps(value)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_every_double(bits):
    (value,) = struct.unpack(">d", bits.to_bytes(8, "big"))
    if math.isfinite(value):
        assert canonical.dumps(value) == rfc8785.dumps(value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, -(2**53), "\ud800", {"\udc00": 1}, {1: 2}, b"x"]
)
def test_what_has_no_spelling(value):
    with pytest.raises(ValueError):
        canonical.dumps([value])
