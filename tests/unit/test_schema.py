"""Our small checker says no wherever the real JSON Schema library does, and to nothing else."""

import copy
import json
import random
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from edgewright import schema
from edgewright.bundle.manifest import SCHEMA

# The library searches with Python's "$", which stands before a last newline, too.
STRICT = json.loads(json.dumps(SCHEMA).replace('$"', '\\\\Z"'))
EXAMPLE = {
    "schema": "edgewright-bundle/1",
    "digest": "0" * 64,
    "name": "tiny",
    "version": "1.2.3",
    "target": "cpu",
    "sequence": 3,
    "source_date_epoch": 0,
    "expires": None,
    "device": {"arch": "x86_64", "isa": ["avx2"]},
    "compatible": ["linux-x86_64"],
    "runtime": {
        "name": "onnxruntime",
        "exact": "1.31.1",
        "min": "1.31",
        "max": "<2",
        "provider": "CPUExecutionProvider",
        "provider_options": {},
        "threads": 1,
        "session": {"session.x": "1"},
        "operators": {"ai.onnx:17": ["MatMul", "Relu"]},
    },
    "model": {
        "path": "model/model.onnx",
        "sha256": "1" * 64,
        "bytes": 100,
        "opset": {"ai.onnx": 17},
        "ir_version": 9,
        "inputs": [{"name": "x", "dtype": "float32", "shape": [1, "n", None]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": None}],
        "quantization": {
            "scheme": {"weights": "int8", "bits": 8, "share": 0.5, "on": True, "x": None},
            "scope": "auto",
            "int8_nodes": 3,
            "float_nodes": 0,
        },
    },
    "golden": {
        "inputs": "model/golden/in.npz",
        "outputs": "model/golden/out.npz",
        "count": 3,
        "tolerances": [{"output": "y", "atol": 0.1, "rtol": 0, "min_equal": 1}],
        "made_with": {
            "runtime": "1.31.1",
            "arch": "x86_64",
            "isa": ["avx2"],
            "emulated": False,
            "exact": True,
        },
        "reason": "because",
    },
    "limits": {
        "max_threads": 1,
        "timeout_s": 60,
        "max_memory_bytes": None,
        "max_model_bytes": 5,
        "max_latency_ms": 2.5,
    },
    "gate": {"verdict": "PASS", "report": "report/gate.json"},
    "files": [{"path": "model/model.onnx", "size": 100, "sha256": "1" * 64, "mode": "0644"}],
}
VALUES = [None, True, False, 0, 1, -1, 2**53 - 1, 10**12, 0.5, -0.5, 1e-3, "", "x", "0644", "a\n"]
VALUES += ["x" * 101, "x" * 3000, "<2", "1.0", "\u2028", "é", "0" * 64, [], {}, [None], ["x"], [[]]]
VALUES += [{"x": 1}, {"path": "x"}, ["x"] * 300, [0], [-1], {"": ""}, {"a b:1": ["A"]}]


def places(value, path=()):
    """Every place of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutants(value):
    """The value with one place put, dropped or added to, every way."""
    for path in places(value):
        if not path:
            continue
        for new in [*VALUES, "drop", "add"]:
            whole = copy.deepcopy(value)
            inner = whole
            for key in path[:-1]:
                inner = inner[key]
            if new == "drop":
                del inner[path[-1]]
            elif new == "add" and isinstance(inner, dict):
                inner["extra"] = 1
            elif new == "add":
                inner.append(inner[path[-1]])
            else:
                inner[path[-1]] = new
            yield whole


def judged_alike(value, judge) -> bool:
    """Whether both checkers agree; the verdict of the real one."""
    valid = judge.is_valid(value)
    found = schema.fault(value, SCHEMA, "manifest")
    assert bool(found) != valid, (found, value)
    assert found.isprintable()
    return valid


def test_every_single_change():
    judge = Draft202012Validator(STRICT)
    assert judged_alike(EXAMPLE, judge)
    verdicts = [judged_alike(value, judge) for value in mutants(EXAMPLE)]
    assert 100 < sum(verdicts) < len(verdicts) - 2000


def test_many_changes_at_once():
    judge, rng = Draft202012Validator(STRICT), random.Random(1)
    for _ in range(1500):
        value = copy.deepcopy(EXAMPLE)
        for _ in range(rng.randint(1, 3)):
            path = rng.choice([p for p in places(value) if p])
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        judged_alike(value, judge)


def test_a_whole_float_is_no_integer():
    """The one place where ours is stricter."""
    assert schema.fault(3.0, {"type": "integer"}, "")
    assert not schema.fault(3.0, {"type": "number"}, "")


def test_a_keyword_it_does_not_know_is_no_pass():
    with pytest.raises(NotImplementedError, match="uniqueItems"):
        schema.fault([], {"type": "array", "uniqueItems": True}, "")


def test_every_keyword_of_our_schemas_is_known():
    folder = Path(schema.__file__).parent / "bundle" / "schema"

    def check(part):
        assert set(part) <= schema.KNOWN, part
        for key in ("properties", "$defs"):
            for inner in part.get(key, {}).values():
                check(inner)
        for key in ("items", "additionalProperties", "propertyNames"):
            if isinstance(part.get(key), dict):
                check(part[key])

    paths = sorted(folder.glob("*.json"))
    assert paths
    for path in paths:
        check(json.loads(path.read_text()))


def test_a_pattern_ends_where_the_text_ends():
    """In ECMA-262, which JSON Schema goes by, "$" does not stand before a last newline."""
    name = {"type": "string", "pattern": "^[a-z]+$"}
    assert not schema.fault("demo", name, "") and schema.fault("demo\n", name, "")
    price = {"type": "string", "pattern": "^[a-z]+\\$$"}
    assert not schema.fault("usd$", price, "") and schema.fault("usd$\n", price, "")
    assert not schema.fault("ab12", {"type": "string", "pattern": "^[a-z]+"}, "")
