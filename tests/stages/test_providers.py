"""Execution providers for real: what is installed here, what is not, and one that takes nothing.

AzureExecutionProvider is in every wheel of onnxruntime, is listed as available, opens a session
and takes no node of any model: the silent fallback in its purest form. OpenVINO runs where
`edgewright setup --target openvino` has been, or its plug-in finds a CPU by Intel.
"""

import json
import platform
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import tiny_model

from edgewright import measure
from edgewright.bundle import packages
from edgewright.errors import BadInput, EnvironmentMissing
from edgewright.measure import host, placement, race
from edgewright.quantize import audit
from edgewright.runtime import doctor, engines, providers, worker
from edgewright.runtime.cpu import host_isa
from edgewright.runtime.launch import launch_for, open_on_target
from edgewright.runtime.session import Session
from edgewright.target import load_target, parse_target
from edgewright.work import node_work

AZURE, OPENVINO = "AzureExecutionProvider", "OpenVINOExecutionProvider"
LISTED = AZURE in onnxruntime.get_available_providers()
needs_azure = pytest.mark.skipif(not LISTED, reason="this onnxruntime does not list Azure")


def here(**runtime):
    """A profile of this machine with one runtime."""
    raw = {"name": "here", "description": "this machine", "device": {"arch": platform.machine()}}
    return parse_target({**raw, "runtime": runtime})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    named = tiny_model()
    for k, node in enumerate(named.graph.node):
        node.name = f"{node.op_type}_{k}"
    onnx.save(named, path)
    return path


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Short slices, and a lock of the test's own."""
    monkeypatch.setattr(race, "SLICE_S", 0.01)
    monkeypatch.setattr(host, "lock_path", lambda: tmp_path / "lock")


def feeds(rows=(1, 1)):
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(n, 1, 12, 12)).astype(np.float32)} for n in rows]


def compare(model, target, **more):
    return measure.compare(model, model, feeds(), target, lambda *_: None, launches=1, **more)


# Nothing silent


@needs_azure
def test_a_provider_that_takes_no_node_is_found_out(model, quick):
    report = json.loads(json.dumps(compare(model, here(provider=AZURE, min_provider_share=0.5))))
    found = report["placement"]
    assert found["provider_share"] == 0
    assert found["ok"] is False
    assert {s["provider"] for s in found["strays"]} == {"CPUExecutionProvider"}
    assert len(found["strays"]) == found["nodes"]["CPUExecutionProvider"] > 0
    assert found["assigned"] == {"CPUExecutionProvider": {"nodes": 8, "groups": 8}}
    assert report["latency"] is None
    assert "too little of the model runs on AzureExecutionProvider" in report["latency_reason"]
    assert report["raw"]["pairs"] == [], "times of another provider are not taken at all"


@needs_azure
def test_forbidding_the_cpu_refuses_the_session_and_still_names_the_nodes(model, quick):
    session = {placement.NO_FALLBACK: "1"}
    strict = here(provider=AZURE, min_provider_share=0.0, session=session)
    with pytest.raises(BadInput, match="fallback to CPU EP has been explicitly disabled"):
        open_on_target(model, strict)
    report = compare(model, strict)
    assert report["placement"]["ok"] is False
    assert len(report["placement"]["strays"]) > 0


def test_an_absent_provider_says_what_to_install(model):
    for name in ("gpu", "tensorrt", "openvino"):
        target = load_target(name)
        entry = doctor.check(target)
        if entry["ready"]:
            continue
        assert entry["reason"]
        assert entry["next"]
    target = here(provider="XnnpackExecutionProvider")
    if "XnnpackExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has XNNPACK")
    with pytest.raises(EnvironmentMissing, match="--use_xnnpack") as caught:
        providers.need_provider(target)
    assert "AzureExecutionProvider" in str(caught.value) or not LISTED
    with pytest.raises(EnvironmentMissing, match="XnnpackExecutionProvider is not in this"):
        open_on_target(model, target)
    with pytest.raises(EnvironmentMissing, match="nothing here runs NoSuchProvider"):
        providers.need_provider(here(provider="NoSuchProvider"))


# What was asked for reaches the runtime


def test_the_work_of_what_ran_is_the_work_of_the_model(model):
    target = here()
    found = placement.profile_nodes(model, target, launch_for(target), feeds(), 5)
    assert found["macs"] == sum(count for _, _, count in node_work(tiny_model())[0])
    assert found["int8_work_share"] == 0
    assert found["provider_share"] == 1.0
    assert found["runs"] == 5


def test_bound_inputs_give_the_same_outputs(model):
    server = worker.Server()
    server.load({"model": str(model), "bind": "cpu"}, {})
    given = feeds((1, 3))
    for k, feed in enumerate(given):
        server.keep_feeds({"first": k == 0}, feed)
    for k, feed in enumerate(given):
        server.call(k)()
        (bound,) = server.bound[k].get_outputs()
        assert np.array_equal(bound.numpy(), server.session.run(None, feed)[0])
    assert len(server.warm({}, {})[0]["wall_s"]) == 2
    server.keep_feeds({"first": True}, given[0])
    assert server.bound == {}, "new feeds are bound anew"


def test_a_profile_may_bind_inputs_while_measuring(model, quick):
    report = compare(model, here(io_binding=True), seconds=0.1)
    assert report["latency"]["ratio"] > 0
    assert report["placement"]["ok"] is True


def test_memory_of_a_gpu_is_known_or_says_why_not(model):
    with Session(model) as session:
        session.keep_feeds(feeds())
        answer = session.ask({"op": "memory", "device": True})[0]
    if providers.has_nvidia_driver():
        assert answer["device_bytes"] or answer["device_reason"]
    else:
        assert answer["device_bytes"] is None
        assert "nvidia-ml-py" in answer["device_reason"] or "NVML" in answer["device_reason"]


def test_engines_are_kept_apart_by_what_they_were_built_from(model, tmp_path):
    target = load_target("tensorrt")
    first = engines.engine_options(target, model, tmp_path)
    assert first == engines.engine_options(target, model, tmp_path)
    assert first["trt_engine_cache_enable"] == "1"
    other = tmp_path / "other.onnx"
    changed = tiny_model()
    changed.graph.initializer[0].raw_data = bytes(len(changed.graph.initializer[0].raw_data))
    onnx.save(changed, other)
    second = engines.engine_options(target, other, tmp_path)
    assert first["trt_engine_cache_path"] != second["trt_engine_cache_path"], "same graph"
    assert engines.engine_options(load_target("gpu"), model, tmp_path) == {}


@pytest.mark.parametrize("name", ["gpu", "tensorrt"])
def test_profiles_of_gpus(name):
    target = load_target(name)
    assert target.runtime.io_binding
    assert launch_for(target).address_space == 0, "CUDA maps more than any limit"
    assert not providers.on_host_cpu(target), "so the wall clock decides"


def test_a_build_that_cannot_be_had_leaves_nothing(tmp_path, monkeypatch):
    target = load_target("openvino")
    if providers.installed(OPENVINO, "CPU")["how"]:
        pytest.skip("OpenVINO is installed, so no build of it is fetched")
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path))
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EnvironmentMissing, match="downloading onnxruntime-openvino"):
        providers.setup(target, lambda text: None)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    with pytest.raises(EnvironmentMissing, match="edgewright setup --target openvino"):
        providers.need_provider(target)


# OpenVINO


@pytest.fixture(scope="module")
def openvino():
    target = load_target("openvino")
    if not (ready := doctor.check(target))["ready"]:
        pytest.skip(ready["reason"])
    return target


def test_openvino_takes_the_model_with_its_precision_pinned(model, openvino, quick):
    report = compare(model, openvino, seconds=0.2)
    found = report["placement"]
    assert found["ok"] is True
    assert found["provider_share"] == 1.0
    assert found["nodes"] == {OPENVINO: 1}, "one compiled node"
    assert found["assigned"][OPENVINO]["nodes"] >= 8
    assert found["macs"] == sum(count for _, _, count in node_work(tiny_model())[0])
    assert found["int8_work_share"] == 0
    assert report["latency"]["primary"] == "cpu"
    assert report["host"]["runtime"] == list(providers.runtime_packages(openvino))
    feed = feeds((2,))[0]
    wanted = onnxruntime.InferenceSession(str(model)).run(None, feed)[0]
    with open_on_target(model, openvino) as session:
        (single,) = session.run(feed)
    assert np.abs(single - wanted).max() < 1e-4, "BF16 would be off by 1e-2"
    if {"avx512_bf16", "amx_bf16"} & host_isa():
        half = openvino.runtime.provider_options["load_config"].replace('"f32"', '"bf16"')
        with open_on_target(model, configured(openvino, half)) as session:
            (lossy,) = session.run(feed)
        assert np.abs(lossy - wanted).max() > 1e-3, "the option reached the provider"


def configured(target, text):
    """The profile with another configuration of OpenVINO."""
    options = {**target.runtime.provider_options, "load_config": text}
    return replace(target, runtime=replace(target.runtime, provider_options=options))


def test_no_file_can_hold_what_openvino_compiled(model, openvino, tmp_path):
    figures, strays = audit.audit(model, [], openvino, tmp_path)
    assert figures == {"available": False}
    assert strays == []


def test_the_lock_names_what_ran(openvino):
    names = {
        f"{one.name} {one.version}" for one in packages.packages(openvino) if one.name != "numpy"
    }
    assert names == set(providers.runtime_packages(openvino))


@pytest.mark.parametrize("text", ["{", '{"CPU": {"NO_SUCH_KEY": "1"}}'])
def test_a_wrong_option_is_an_error_and_no_fallback(model, openvino, text):
    with pytest.raises((BadInput, EnvironmentMissing), match="refused") as caught:
        open_on_target(model, configured(openvino, text))
    assert "::" not in str(caught.value), "no C++ in a message"
