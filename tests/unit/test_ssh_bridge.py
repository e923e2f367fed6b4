"""The bridge and its link without a network: a device that answers what a test tells it to."""

import asyncio
import io
import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip("asyncssh")

from edgewright.errors import BadInput, DeviceUnavailable
from edgewright.runtime import worker
from edgewright.runtime.ssh import answers, bridge, channel
from edgewright.runtime.ssh.channel import Channel, Lost
from edgewright.target import RunSettings

RUN = RunSettings(how="ssh", host="board", user="edge", reconnect_s=5.0)
LOADED = {
    "inputs": [{"name": "x", "type": "tensor(float)", "shape": [2]}],
    "outputs": [
        {"name": "y", "type": "tensor(float)", "shape": [2]},
        {"name": "z", "type": "tensor(float)", "shape": [2]},
    ],
    "providers": ["CPUExecutionProvider"],
    "version": "1.31.1",
    "import_s": 0.2,
    "load_s": 0.1,
    "rss_before_load_kib": 5,
    "rss_after_load_kib": 6,
    "peak_after_load_kib": 7,
}


class Device:
    """All links to one device. `says`: operation -> the answer of the worker there, or Lost."""

    def __init__(self, **says):
        self.says = {"load": LOADED, "feeds": {"count": 1}, "spin": {"wall_s": 1.0}, **says}
        self.links, self.opened = [], []
        self.file = b""  # the optimised model

    def link(self, name, run):
        self.links.append(Link(self))
        return self.links[-1]


class Link:
    """What the bridge uses of a Channel."""

    device = "device board"

    def __init__(self, home):
        self.home = home
        self.end = asyncio.Event()
        self.dropped = False

    async def open(self):
        if "open" in self.home.says:
            raise self.home.says["open"]
        self.home.opened.append(self)

    async def push(self, files, stored=True):
        return "/there"

    async def ask(self, header, data=b""):
        if header["op"] == "get":
            return {"found": True}, self.home.file
        return {"cores": 1}, b""

    async def send(self, header, data=b""):
        if header["op"] == "data":  # small enough to come whole
            size = int.from_bytes(data[:8], "big")
            self.asked = json.loads(data[8 : 8 + size])

    async def next_message(self):
        answer = self.home.says.get(getattr(self, "asked", {"op": "command"})["op"], Lost("cut"))
        if isinstance(answer, Lost):
            raise answer
        words = json.dumps(answer).encode()
        size = answers.array_bytes(answer.get("arrays", []), "it") if "huge" not in answer else 0
        return {"op": "data"}, len(words).to_bytes(8, "big") + words + bytes(size)

    async def closed(self):
        await self.end.wait()

    def drop(self):
        self.dropped = True

    async def close(self):
        self.drop()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"a model")
    return path


def ask(device, monkeypatch, *requests):
    """The answers to some requests, errors among them, and the bridge."""
    monkeypatch.setattr(bridge, "Channel", device.link)
    one = bridge.Bridge("board", RUN, 0)

    async def all_of_them():
        found = []
        for header in requests:
            try:
                found.append((await one.answer(header, b""))[0])
            except (BadInput, DeviceUnavailable) as error:
                found.append(error)
        return found

    return asyncio.run(all_of_them()), one


def array(name, *shape, dtype="<f4"):
    return {"name": name, "dtype": dtype, "shape": list(shape)}


@pytest.mark.parametrize(
    ("outputs", "arrays", "good"),
    [
        (None, ["y", "z"], True),
        ([], ["y", "z"], True),
        (["z"], ["z"], True),
        (None, ["y"], False),
        (None, ["y", "z", "z"], False),
        (["z"], ["y"], False),
        (["z"], [], False),
    ],
)
def test_a_run_gives_the_outputs_that_were_asked_for(model, monkeypatch, outputs, arrays, good):
    device = Device(run={"arrays": [array(name, 2) for name in arrays]})
    load = {"op": "load", "model": str(model)}
    (_, told), one = ask(device, monkeypatch, load, {"op": "run", "outputs": outputs})
    if good:
        assert [row["name"] for row in told["arrays"]] == arrays
    else:
        assert type(told) is DeviceUnavailable and "makes no sense" in str(told)
        assert device.links[0].dropped and one.link is None


def test_only_a_run_gives_arrays_and_no_failed_one(model, monkeypatch):
    load = {"op": "load", "model": str(model)}
    spin = {"op": "spin", "count": 1}
    (_, told), _ = ask(
        Device(spin={"wall_s": 1.0, "arrays": [array("y", 2)]}), monkeypatch, load, spin
    )
    assert "makes no sense" in str(told)
    error = {"error": {"kind": "Fail", "text": "no"}, "arrays": []}
    (_, told), one = ask(Device(run=error), monkeypatch, load, {"op": "run"})
    assert told["error"]["text"] == "no" and one.link is not None


def test_an_answer_that_is_too_large_costs_the_link(model, monkeypatch):
    """Its bytes are still on their way: the next answer would begin among them."""
    huge = {"arrays": [array("y", 1 << 35), array("z", 2)], "huge": True}
    load = {"op": "load", "model": str(model)}
    device = Device(run=huge)
    requests = [load, {"op": "run"}, {"op": "spin", "count": 1}]
    (_, told, spun), _ = ask(device, monkeypatch, *requests)
    assert type(told) is BadInput and "at most" in str(told)
    assert spun["wall_s"] == 1.0
    assert [link.dropped for link in device.links] == [True, False]


def test_a_model_that_is_refused_after_the_link_dropped_is_told(model, monkeypatch):
    device = Device(run=Lost("cut"))
    real = device.link

    def link(name, run):
        if device.links:
            device.says["load"] = {"error": {"kind": "Fail", "text": "no memory for it"}}
        return real(name, run)

    monkeypatch.setattr(device, "link", link)
    load = {"op": "load", "model": str(model), "name": "m.onnx"}
    (_, told), one = ask(device, monkeypatch, load, {"op": "run"})
    assert type(told) is DeviceUnavailable
    assert "refused m.onnx" in str(told) and "Fail: no memory for it" in str(told)
    assert len(device.links) == 2 and one.link is None


def test_what_failed_is_not_asked_again(model, monkeypatch):
    device = Device(feeds={"error": {"kind": "MemoryError", "text": "no"}})
    _, one = ask(
        device, monkeypatch, {"op": "load", "model": str(model)}, {"op": "feeds", "first": True}
    )
    assert [header["op"] for header, _ in one.session] == ["load"]


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("slice", "was lost during a measurement;"),
        ("command", "was lost before a command there had ended;"),
    ],
)
def test_a_lost_link_is_told_by_what_was_under_way(model, monkeypatch, op, words):
    requests = {
        "slice": [{"op": "load", "model": str(model)}, {"op": "slice", "seconds": 1}],
        "command": [{"op": "command", "files": {}, "words": []}],
    }
    found, _ = ask(Device(), monkeypatch, *requests[op])
    assert type(found[-1]) is DeviceUnavailable and words in str(found[-1])


def test_an_optimised_model_is_not_larger_than_it_may_be(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "OPTIMIZED_MORE", 0)
    place = tmp_path / "optimized.onnx"
    load = {"op": "load", "model": str(model), "optimized": str(place)}
    device = Device()
    device.file = bytes(2 * len(b"a model"))
    ask(device, monkeypatch, load)
    assert place.read_bytes() == device.file
    place.unlink()
    device.file += b"x"
    (told,), _ = ask(device, monkeypatch, load)
    assert type(told) is DeviceUnavailable and "15 bytes" in str(told)
    assert not place.exists()


class Pipe(io.BytesIO):
    """What a session has sent; its end comes when a test says so."""

    def __init__(self, data, end):
        super().__init__(data)
        self.wait = end

    def read(self, size=-1):
        found = super().read(size)
        if not found:
            assert self.wait.wait(20)
        return found


def told_by(sink):
    """The answers that were written to a pipe."""
    sink.seek(0)
    found = []
    while sink.tell() < len(sink.getvalue()):
        found.append(worker.receive(sink)[0])
    return found


def test_inputs_that_are_too_large_are_refused_and_the_next_request_is_found(monkeypatch):
    monkeypatch.setattr(answers, "ARRAYS_MAX", 100)
    device = Device()
    monkeypatch.setattr(bridge, "Channel", device.link)
    source, sink = io.BytesIO(), io.BytesIO()
    worker.send(source, {"op": "run"}, [("x", np.zeros(26, np.float32))])
    worker.send(source, {"op": "facts"})
    source.seek(0)
    asyncio.run(bridge.serve(source, sink, bridge.Bridge("board", RUN, 0)))
    refused, good = told_by(sink)
    assert refused["error"]["kind"] == "BadInput" and "104 bytes" in refused["error"]["text"]
    assert good["facts"] == {"cores": 1}


@pytest.mark.parametrize("values", [np.array(["ab", "c"]), np.arange(6, dtype=">f4").reshape(2, 3)])
def test_inputs_that_only_numpy_knows_are_left_to_the_worker(values):
    source = io.BytesIO()
    worker.send(source, {"op": "run"}, [("x", values)])
    source.seek(0)
    header, data = bridge.receive(source)
    assert data == values.tobytes() and header["arrays"][0]["dtype"] == values.dtype.str


def serve_until(device, monkeypatch, request, done):
    """Serve one request, then wait for another until `done` or a few seconds have gone."""
    monkeypatch.setattr(bridge, "Channel", device.link)
    monkeypatch.setattr(bridge, "PAUSE_S", 0.01)
    monkeypatch.setattr(bridge, "PAUSE_MAX_S", 0.02)
    source, end = io.BytesIO(), threading.Event()
    worker.send(source, request)

    async def run():
        one = bridge.Bridge("board", RUN, 0)
        serving = asyncio.create_task(bridge.serve(Pipe(source.getvalue(), end), io.BytesIO(), one))
        limit = time.monotonic() + 5
        while not done() and time.monotonic() < limit:
            await asyncio.sleep(0.01)
        end.set()
        await serving

    asyncio.run(run())


def test_a_link_that_holds_the_device_is_opened_again_without_being_asked(monkeypatch):
    device = Device()

    def done():
        if len(device.opened) == 1:
            device.says["open"] = DeviceUnavailable("the device is still away")
            device.opened[0].end.set()
        if len(device.links) > 3:
            device.says.pop("open", None)
        return len(device.opened) == 2

    serve_until(device, monkeypatch, {"op": "facts"}, done)
    assert len(device.opened) == 2 and all(link.dropped for link in device.links)


def test_a_link_with_a_worker_waits_for_the_next_request(model, monkeypatch):
    """Else the device would load a model while another is measured there."""
    device = Device()
    begin = time.monotonic()

    def done():
        if device.links:
            device.links[0].end.set()
        return time.monotonic() - begin > 0.3

    serve_until(device, monkeypatch, {"op": "load", "model": str(model)}, done)
    assert len(device.links) == 1


def test_signs_of_life_go_on_while_files_are_hashed(model, monkeypatch):
    threads = []

    def sha256(path):
        threads.append(threading.current_thread())
        return "0" * 64

    async def have(header, data=b""):
        return {"have": True, "folder": "/there"}, b""

    async def run():
        link = Channel("board", RUN)
        link.ask = have
        return await link.push({"model.bin": model})

    monkeypatch.setattr(channel, "sha256_of", sha256)
    assert asyncio.run(run()) == "/there"
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
