"""A provider that is present and takes no node, and one that is absent: neither can pass."""

import json
import platform

import onnxruntime
import pytest

PROFILE = """\
name = "{name}"
description = "a provider of this machine, or not"

[device]
arch = "{arch}"

[runtime]
provider = "{provider}"
min_provider_share = 0.5

[int8]
style = "none"
"""


def profile(folder, name, provider):
    path = folder / f"{name}.toml"
    arch = platform.machine()
    path.write_text(PROFILE.format(name=name, arch=arch, provider=provider))
    return path


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime does not list Azure",
)
def test_a_provider_that_takes_no_node_fails_the_build(edgewright, tiny):
    path = profile(tiny.parent, "azure", "AzureExecutionProvider")
    assert edgewright("doctor", "--target", path).code == 0, "it is there: only a run tells"
    out = tiny.parent / "out"
    ran = edgewright("build", tiny, "--target", path, "--out", out)
    assert ran.code == 1, ran.err
    report = json.loads((out / "azure" / "report.json").read_text())
    gate = next(s["report"] for s in report["stages"] if s["stage"] == "gate")
    check = next(c for c in gate["checks"] if c["name"] == "min_provider_share")
    assert check["verdict"] == "FAIL"
    assert check["value"] == 0
    assert "only 0.0% of the work on AzureExecutionProvider; elsewhere: " in check["reason"]
    assert "Conv on CPUExecutionProvider" in check["reason"]
    assert "FAIL" in ran.err
    models = out / "azure" / "model.onnx", tiny.parent / "model.onnx"
    words = ("gate", "--candidate", models[0], "--baseline", models[1], "--target", path)
    ran = edgewright(*words, "--json")
    assert ran.code == 1, ran.err
    found = {c["name"]: c for c in ran.json["gate"]["checks"]}
    assert found["min_provider_share"]["verdict"] == "FAIL"
    assert "Conv on CPUExecutionProvider" in found["min_provider_share"]["reason"]
    assert "validate" in ran.json and "too little" in ran.json["validate"]["skipped"]
    ran = edgewright("bench", models[0], "--target", path)
    assert ran.code == 3, ran.out
    assert "too little of the model runs on AzureExecutionProvider" in ran.err
    assert "Conv on CPUExecutionProvider" in ran.err
    assert not ran.out


def test_an_absent_provider_ends_the_build_before_it_begins(edgewright, tiny):
    name = "XnnpackExecutionProvider"
    if name in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    path = profile(tiny.parent, "mobile", name)
    out = tiny.parent / "out"
    ran = edgewright("build", tiny, "--target", path, "--out", out)
    assert ran.code == 6
    assert f"nothing here runs {name}" in ran.err
    assert "--use_xnnpack" in ran.err
    assert not (out / "mobile" / "stages").exists()
