"""The shipped target profiles, and what reading a profile refuses."""

import pytest

from edgewright.errors import BadInput, UsageError
from edgewright.runtime import emulator
from edgewright.settings import load_toml
from edgewright.target import (
    Int8Scheme,
    load_target,
    parse_target,
    profiles_folder,
    target_names,
)

SHIPPED = ["arm", "arm-a53", "arm-i8mm", "arm-n1"]
SHIPPED += ["cpu", "cpu-avx2", "gpu", "openvino", "tensorrt", "xnnpack"]
SHARES = {"CPUExecutionProvider": 1.0, "XnnpackExecutionProvider": 0.5}
MINIMAL = {"name": "mine", "description": "a board", "device": {"arch": "aarch64"}}


def test_shipped_profiles_are_complete():
    assert target_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_loads(name):
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert target.raw == load_toml(profiles_folder() / f"{name}.toml", "profile")
    assert target.device.compatible, "an install must be able to refuse the wrong device"
    assert target.runtime.min_provider_share == SHARES.get(target.runtime.provider, 0.9)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cpu_descriptions_are_consistent(name):
    target = load_target(name)
    if target.run.how != "emulate":
        assert target.run.cpu_model == ""
        return
    emulator.check_cpu(target)
    if target.device.arch == "aarch64":
        assert target.run.cpu_features.split()
        for flag in target.device.isa:
            assert flag in target.run.cpu_features.split()


# QEMU model -> the identities, as (part, variant), whose kernels it can run, and instructions it
# has beyond ASIMD. From the CPUs' manuals, and from what ONNX Runtime was seen to execute.
CPUS = {
    "cortex-a53": ([("0xd03", "0x0")], set()),
    "cortex-a76": ([("0xd0b", "0x4"), ("0xd05", "0x2")], {"asimddp"}),
    "neoverse-n1": ([("0xd0c", "0x3")], {"asimddp"}),
    "max,sve=off,sme=off,pauth=off": ([("0xd47", "0x2")], {"asimddp", "i8mm"}),
}
EMULATED_ARM = [name for name in SHIPPED if name.startswith("arm")]


@pytest.mark.parametrize("name", EMULATED_ARM)
def test_arm_identity_features_and_cores_describe_the_emulated_cpu(name):
    target = load_target(name)
    run = target.run
    identities, extra = CPUS[run.cpu_model]
    assert (run.cpu_part, run.cpu_variant) in identities
    dot = {"asimddp", "i8mm", "sve", "sve2", "sme"}
    assert dot & set(run.cpu_features.split()) == dot & set(target.device.isa) == extra
    assert {c for c in target.device.compatible if c.startswith("cpu:")} == {
        f"cpu:{flag}" for flag in extra
    }
    assert 1 <= target.runtime.threads <= run.cores


def test_schemes_fit_the_kernels():
    schemes = {name: load_target(name).int8 for name in SHIPPED}
    assert schemes["arm"].activations == "int8"
    assert schemes["cpu"] == Int8Scheme()
    assert schemes["cpu-avx2"].saturates
    assert [name for name, scheme in schemes.items() if scheme.saturates] == ["cpu-avx2"]
    assert schemes["gpu"].style == "none"
    assert schemes["tensorrt"].symmetric_activations


def test_unknown_key_is_refused_with_a_suggestion():
    raw = {**MINIMAL, "run": {"how": "emulate", "cpu_modell": "cortex-a76"}}
    with pytest.raises(BadInput, match="did you mean 'cpu_model'") as caught:
        parse_target(raw)
    assert caught.value.exit_code == 3


def test_unknown_target_is_refused_with_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'arm-a53'") as caught:
        load_target("arm-a54")
    assert caught.value.exit_code == 2
    assert str(caught.value).endswith("named by path; did you mean 'arm-a53'?")


def test_a_share_is_between_0_and_1():
    with pytest.raises(BadInput, match=r"min_int8_share; expected 0 to 1; found 1\.5"):
        parse_target({**MINIMAL, "runtime": {"min_int8_share": 1.5}})


def test_own_profile_is_read_by_path(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text('name = "board"\ndescription = "mine"\n[device]\narch = "x86_64"\n')
    assert load_target(str(path)).name == "board"


def test_missing_own_profile_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="not found"):
        load_target(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"how": "emulate"}, "run.cpu_model"),
        ({"how": "ssh"}, "run.host"),
        ({"how": "emulated", "cpu_model": "max"}, "did you mean 'emulate'"),
        ({"cores": "4"}, "a whole number"),
    ],
)
def test_run_section_is_checked(run, message):
    with pytest.raises(BadInput, match=message):
        parse_target({**MINIMAL, "run": run})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_part": "0xd03"}, "does not belong to run.cpu_model 'cortex-a76'"),
        ({"cpu_part": "d0b"}, "run.cpu_part"),
        ({"cpu_variant": ""}, "run.cpu_variant"),
        ({"cpu_model": "max"}, "SVE"),
        ({"cores": 0}, "run.cores"),
    ],
)
def test_contradictory_cpu_is_refused(change, message):
    run = {"how": "emulate", "cpu_model": "cortex-a76", "cpu_part": "0xd0b", "cpu_variant": "0x4"}
    target = parse_target({**MINIMAL, "run": {**run, **change}})
    with pytest.raises(BadInput, match=message):
        emulator.check_cpu(target)
