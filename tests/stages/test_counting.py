"""Counting instructions under emulation: classes of opcodes, exactness, what the gate makes of it.

Needs `edgewright setup --target arm`; skipped with the reason without it.
"""

import json
import os
import subprocess

import numpy as np
import pytest
from test_emulator import CHANNELS, SIZE, write_convs

from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.gate import decide
from edgewright.gate.instructions import int8_instructions
from edgewright.measure import compare
from edgewright.measure.instructions import int8_layers, kernels, promised
from edgewright.model import load
from edgewright.recipe import GateSettings
from edgewright.runtime import counting, emulator, toolchain
from edgewright.stage import say_nothing
from edgewright.target import Target, load_target

# The classes by the names of the instructions; the assembler knows their encodings.
OPCODES = {
    "dot": [
        "sdot v0.4s, v1.16b, v2.16b",
        "sdot v0.2s, v1.8b, v2.8b",
        "sdot v3.4s, v31.16b, v15.4b[3]",
        "udot v0.4s, v1.16b, v2.16b",
        "udot v30.2s, v1.8b, v2.4b[1]",
    ],
    "i8mm": [
        "usdot v0.4s, v1.16b, v2.16b",
        "usdot v0.4s, v1.16b, v2.4b[3]",
        "sudot v0.4s, v1.16b, v2.4b[1]",
        "smmla v0.4s, v1.16b, v2.16b",
        "ummla v0.4s, v1.16b, v2.16b",
        "usmmla v0.4s, v1.16b, v2.16b",
    ],
    "mlal": [
        "smlal v0.8h, v1.8b, v2.8b",
        "smlal2 v0.4s, v1.8h, v2.8h",
        "umlal v0.2d, v1.2s, v2.2s",
        "smlsl v0.8h, v1.8b, v2.8b",
        "smull v0.8h, v1.8b, v2.8b",
        "umull2 v0.4s, v1.8h, v2.8h",
        "smlal v0.4s, v1.4h, v2.h[7]",
        "umull v0.2d, v1.2s, v2.s[3]",
    ],
    "fmla": [
        "fmla v0.4s, v1.4s, v2.4s",
        "fmls v0.2d, v1.2d, v2.2d",
        "fmla v0.8h, v1.8h, v2.8h",
        "fmla v0.4s, v1.4s, v2.s[3]",
        "fmls v0.2d, v1.2d, v2.d[1]",
        "fmla v0.8h, v1.8h, v2.h[5]",
        "fmadd s0, s1, s2, s3",
        "fnmsub d0, d1, d2, d3",
    ],
    "simd": [
        "add v0.4s, v1.4s, v2.4s",
        "mla v0.4s, v1.4s, v2.4s",
        "mul v0.8h, v1.8h, v2.h[1]",
        "fadd s0, s1, s2",
        "fmul v0.4s, v1.4s, v2.s[1]",
        "fmulx v0.4s, v1.4s, v2.s[1]",
        "sqdmlal v0.4s, v1.4h, v2.4h",
        "sqdmull v0.4s, v1.4h, v2.h[1]",
        "pmull v0.8h, v1.8b, v2.8b",
        "sadalp v0.4s, v1.8h",
        "saddl v0.8h, v1.8b, v2.8b",
        "sqrdmlah v0.4s, v1.4s, v2.4s",
        "bfdot v0.4s, v1.8h, v2.8h",
        "bfdot v0.4s, v1.8h, v2.2h[1]",
        "tbl v0.16b, {v1.16b}, v2.16b",
        "dup v0.4s, w1",
        "fcvtzs v0.4s, v1.4s",
    ],
    "sve": ["add z0.s, z0.s, z1.s", "sdot z0.s, z1.b, z2.b", "ld1b {z0.b}, p0/z, [x1]"],
    "memory": [
        "ldr x2, [x1]",
        "ldrb w2, [x1, #3]",
        "ldp x2, x3, [x1]",
        "ldr q0, [x1]",
        "stp q0, q1, [x1]",
        "ld1 {v0.16b, v1.16b}, [x1]",
        "ld1r {v0.4s}, [x1]",
        "prfm pldl1keep, [x1]",
    ],
    "branch": ["b .+4", "cbz xzr, .+4", "nop", "dmb ish", "mrs x2, tpidr_el0"],
    "other": ["add x2, x2, #1", "madd x2, x3, x4, x5", "csel x2, x3, x4, eq", "adr x2, ."],
}  # fmt: skip
TIMES = 3
BETWEEN = 3  # branches that belong to the markers: a call, the marker itself, a return


def target_or_skip(name: str) -> Target:
    target = load_target(name)
    try:
        emulator.launch(target)
        toolchain.runner(target.device.arch)
        toolchain.plugin()
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    if (version := emulator.qemu_version(target.device.arch) or "").startswith("10"):
        pytest.skip(f"QEMU {version} of the distribution has no plug-ins")
    return target


def test_every_opcode_is_in_its_class(tmp_path):
    """A program that executes each instruction three times between two markers."""
    target_or_skip("arm")
    listed = [(name, line) for name, lines in OPCODES.items() for line in lines]
    code = [".arch armv8.6-a+sve+i8mm+bf16+fp16", ".globl _start", "_start:"]
    code += ["sub sp, sp, #256", "mov x1, sp"]
    for _, line in listed:
        code += ["bl mark", *[line] * TIMES, "bl mark"]
    code += ["mov x0, #0", "mov x8, #93", "svc #0", "mark: .inst 0xd5032fff", "ret", ""]
    (tmp_path / "all.s").write_text("\n".join(code))
    compiler = toolchain.compiler("aarch64")
    words = [compiler, "-nostdlib", "-static", "-o", "all", "all.s"]
    subprocess.run(words, cwd=tmp_path, check=True)
    (tmp_path / "count.so").symlink_to(toolchain.plugin())
    words = [emulator.find_qemu("aarch64"), "-cpu", "max", "-plugin"]
    words += ["./count.so,out=counts.json,arch=aarch64", "./all"]
    subprocess.run(words, cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "counts.json").read_text())
    marks = np.array(found["marks"])
    for (name, line), counts in zip(listed, marks[1::2] - marks[::2], strict=True):
        expected = {name: TIMES, "branch": BETWEEN + (TIMES if name == "branch" else 0)}
        counted = {k: v for k, v in zip(found["classes"], counts.tolist(), strict=True) if v}
        assert counted == expected, line


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    shape = (1, CHANNELS, SIZE, SIZE)
    return {"x": np.random.default_rng(1).random(shape).astype(np.float32)}


def test_counts_are_the_same_in_every_run_process_and_folder(feed, tmp_path):
    target = target_or_skip("arm")
    there = tmp_path / "another, longer name of a folder"
    there.mkdir()
    first = counting.count(write_convs(tmp_path / "model.onnx", "int8"), feed, target)
    second = counting.count(write_convs(there / "model.onnx", "int8"), feed, target)
    assert first.equal >= 3 and first.total == second.total
    assert first.classes == second.classes and sum(first.classes.values()) == first.total
    # Two convolutions of 16 channels, 8x8 pixels, 3x3: 295 thousand multiplications, 16 in an SDOT.
    assert first.classes["dot"] >= 2 * SIZE * SIZE * CHANNELS * CHANNELS * 9 / 16
    assert first.classes["i8mm"] == 0


def test_the_report_and_the_gate_of_an_emulated_target(feed, tmp_path):
    target = target_or_skip("arm")
    int8, other = (write_convs(tmp_path / f"{k}.onnx", k) for k in ("int8", "uint8"))
    measure = compare(int8, other, [feed], target, say_nothing)
    found = measure["instructions"]
    assert measure["instructions_reason"] is None
    assert found["candidate"]["exact"] and found["original"]["exact"]
    assert found["ratio"] == found["candidate"]["total"] / found["original"]["total"]
    assert found["kernels"]["layers"] == int8_layers(load(int8)) == 2
    for limit, verdict in ((found["ratio"] / 1.004, "PASS"), (found["ratio"] / 1.006, "FAIL")):
        gate = GateSettings(max_instruction_ratio=limit, max_latency_ms=1.0)
        judged = {c["name"]: c for c in decide(gate, target.budget, {}, measure)["checks"]}
        assert judged["max_instruction_ratio"]["verdict"] == verdict
        assert judged["int8_instructions"]["verdict"] == "PASS"
        assert judged["max_latency_ms"]["verdict"] == "NOT JUDGED"


def test_kernels_are_those_of_the_cpu(feed, tmp_path):
    """Dot products on an A76, none on an A53, and no USMMLA for int8 by int8 whatever the CPU."""
    model = write_convs(tmp_path / "model.onnx", "int8")
    counts = {}
    for name in ("arm", "arm-a53", "arm-i8mm"):
        target = target_or_skip(name)
        found = counts[name] = counting.count(model, feed, target)
        measure = {"instructions": {"kernels": kernels(model, found, target)}}
        [check] = int8_instructions(measure)
        assert check["verdict"] == ("FAIL" if name == "arm-i8mm" else "PASS"), check
    assert counts["arm"].classes["dot"] > 0
    assert counts["arm-a53"].classes["dot"] == counts["arm-a53"].classes["i8mm"] == 0
    assert counts["arm-a53"].classes["mlal"] > counts["arm"].classes["mlal"]
    assert counts["arm"].total < counts["arm-a53"].total
    assert promised(target) == "i8mm" and counts["arm-i8mm"].classes["i8mm"] == 0
    assert "0 8-bit matrix" in check["reason"] and "2 int8 layers" in check["reason"]


def test_an_emulator_without_plug_ins_is_told(feed, tmp_path, monkeypatch):
    """As Debian 13's, or a static one: the rest of the measurement is not touched."""
    target = target_or_skip("arm")
    old = tmp_path / "bin" / "qemu-aarch64"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho \"qemu: unknown option 'plugin'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:{os.environ['PATH']}")
    model = write_convs(tmp_path / "model.onnx", "int8")
    with pytest.raises(EnvironmentMissing, match="does not take our plug-in") as caught:
        counting.count(model, feed, target)
    assert caught.value.exit_code == 6


def test_what_the_runner_says_of_the_model_is_passed_on(feed, tmp_path):
    target = target_or_skip("arm")
    model = write_convs(tmp_path / "model.onnx", "int8")
    with pytest.raises(BadInput, match="has no array 'x__000'"):
        counting.count(model, {"y": feed["x"]}, target)


def test_x86_is_counted_without_classes(feed, tmp_path):
    target = target_or_skip("cpu-avx2")
    model = write_convs(tmp_path / "model.onnx", "uint8")
    counts = counting.count(model, feed, target)
    assert counts.classes == {} and counts.equal >= 3
