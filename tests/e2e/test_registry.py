"""Bundles in an OCI registry: a real one (Debian's docker-registry) on the loopback interface."""

import http.server
import json
import platform
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from conftest import tiny_model

from edgewright import bundle as bundles
from edgewright import signing
from edgewright.device import trust as trusts
from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError
from edgewright.recipe import parse_recipe
from edgewright.registry import artifact
from edgewright.registry.connection import PASSWORD, USER, Registry
from edgewright.registry.reference import is_loopback, parse
from edgewright.runtime import toolchain
from edgewright.stage import Job
from edgewright.target import load_target

PROGRAM = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(
    PROGRAM is None, reason="no docker-registry here: apt-get install docker-registry"
)
# The password of the first test vector of crypt_blowfish (Openwall), and its bcrypt.
SECRET, BCRYPT = "U*U", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two signed releases that differ in their number, and the keys."""
    pytest.importorskip("cryptography")
    folder = tmp_path_factory.mktemp("registry")
    onnx.save(tiny_model(), folder / "model.onnx")
    np.savez(folder / "calibration.npz", x=np.ones((3, 1, 12, 12), np.float32))
    for name in ("ours", "theirs"):
        signing.keygen(folder / name)
    compiles = toolchain.compiler(platform.machine()) is not None
    for k in (1, 2):
        out = folder / f"s{k}"
        out.mkdir()
        recipe = {
            "model": {"name": "tiny", "version": f"1.{k}", "source": "model.onnx"},
            "data": {"calibration": "calibration.npz"},
            # A program among the files, where it can be compiled: its mode travels, too.
            "release": {"sequence": k, "license": "MIT", "runner": compiles},
        }
        job = Job(
            recipe=parse_recipe(recipe, folder),
            target=load_target("cpu"),
            folder=out,
            model=folder / "model.onnx",
        )
        path = (out / bundles.run(job)["bundle"]).rename(folder / f"s{k}.bundle.tar")
        key = signing.signer(str(folder / "ours"), {})
        signing.sign_bundle(path, [key], any_verdict=True)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def serve(folder: Path, more: str = "") -> tuple[subprocess.Popen, str]:
    """A registry that keeps its blobs in `folder`; the process, HOST:PORT."""
    place = f"127.0.0.1:{free_port()}"
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: "
        f"{folder}/store}}}}\nhttp: {{addr: '{place}'}}\n{more}"
    )
    words = [str(PROGRAM), "serve", str(folder / "config.yml")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://{place}/v2/", timeout=5).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.05)
    return process, place


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """HOST:PORT of an open registry, and where it keeps its blobs."""
    folder = tmp_path_factory.mktemp("blobs")
    process, place = serve(folder)
    yield place, folder / "store"
    process.kill()
    process.wait()


def at(reference: str, environment: dict[str, str] = {}) -> Registry:
    return Registry(parse(reference), True, environment)


def trusting(made: Path, name: str = "ours"):
    return trusts.load([made / f"{name}.pub"], None, None)


@needs_registry
def test_there_and_back_bit_for_bit(made, registry, edgewright, tmp_path):
    """By the commands; what the second release shares with the first is not sent again."""
    place, _ = registry
    name = f"{place}/models/tiny"
    first = edgewright("push", made / "s1.bundle.tar", f"{name}:1.1", "--plain-http", "--json")
    assert first.code == 0, first.err
    assert first.json["sent"] == first.json["bytes"]
    second = artifact.push(made / "s2.bundle.tar", at(f"{name}:1.2"))
    assert 0 < second["sent"] < 0.5 * second["bytes"]
    assert artifact.push(made / "s2.bundle.tar", at(f"{name}:1.2"))["sent"] == 0
    out = tmp_path / "back.bundle.tar"
    words = ("pull", f"{name}:1.1", "-o", out, "--plain-http", "--trust", made / "ours.pub")
    back = edgewright(*words)
    assert back.code == 0 and "good, by " in back.out, back.err
    assert out.read_bytes() == (made / "s1.bundle.tar").read_bytes()
    found, digest = artifact.pull(at(second["reference"]), out, trusting(made))
    assert found.manifest["sequence"] == 2 and digest == second["digest"]
    assert out.read_bytes() == (made / "s2.bundle.tar").read_bytes()


@needs_registry
def test_the_artifact_is_one_by_the_specification(made, registry):
    """As another client sees it: by tag and by digest, each blob under its own name."""
    place, _ = registry
    said = artifact.push(made / "s1.bundle.tar", at(f"{place}/spec:1"))
    url = f"http://{place}/v2/spec/"
    ask = urllib.request.Request(f"{url}manifests/1", headers={"Accept": artifact.KIND})
    with urllib.request.urlopen(ask) as answer:
        assert answer.headers["Content-Type"] == "application/vnd.oci.image.manifest.v1+json"
        assert answer.headers["Docker-Content-Digest"] == said["digest"]
        content = json.load(answer)
    assert content["schemaVersion"] == 2
    assert content["artifactType"] == "application/vnd.edgewright.bundle.v1"
    empty = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert content["config"]["digest"] == empty  # that of the image specification for `{}`
    names = [row["annotations"]["org.opencontainers.image.title"] for row in content["layers"]]
    assert names[:2] == ["manifest.json", "manifest.dsse.json"] and "model/model.onnx" in names
    row = content["layers"][names.index("model/model.onnx")]
    with urllib.request.urlopen(f"{url}blobs/{row['digest']}") as answer:
        assert answer.read() == (made / "model.onnx").read_bytes()


def refuse(place: Registry, out: Path, kind: type[Exception], word: str, trust=None) -> None:
    with pytest.raises(kind, match=word) as caught:
        artifact.pull(place, out, trust)
    assert str(caught.value).isprintable()
    assert not out.exists() and not list(out.parent.glob(".*"))


@needs_registry
def test_what_is_not_what_it_should_be(made, registry, tmp_path):
    place, store = registry
    out = tmp_path / "x.bundle.tar"
    name = f"{place}/bad"
    refuse(at(f"{name}:none"), out, BadInput, "not in the registry")
    said = artifact.push(made / "s1.bundle.tar", at(f"{name}:1"))
    refuse(at(f"{name}:1"), out, IntegrityError, "signature is refused", trusting(made, "theirs"))
    wrong = said["reference"][:-1] + ("0" if said["reference"][-1] != "0" else "1")
    refuse(at(wrong), out, BadInput, "not in the registry")
    # Another release under the tag: its digest tells.
    artifact.push(made / "s2.bundle.tar", at(f"{name}:1"))
    found, _ = artifact.pull(at(said["reference"]), out, None)
    assert found.manifest["sequence"] == 1
    out.unlink()
    # An image of somebody else.
    image = {"schemaVersion": 2, "mediaType": artifact.KIND, "layers": []}
    image["config"] = artifact.descriptor("application/vnd.oci.image.config.v1+json", "", 2)
    image["config"]["digest"] = f"sha256:{artifact.digest_of(b'{}')}"
    put = {"Content-Type": artifact.KIND}
    answer = at(f"{name}:image").ask(
        "PUT", "manifests/image", put, json.dumps(image).encode(), good=(201,)
    )
    answer.close()
    refuse(at(f"{name}:image"), out, BadInput, "is no bundle")
    # Blobs that changed where they lie: one bit, cut off, too long.
    digest = artifact.digest_of((made / "model.onnx").read_bytes())
    path = store / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
    data = path.read_bytes()
    for bad in (bytes([data[0] ^ 1]) + data[1:], data[:-1], data + b"x"):
        path.write_bytes(bad)
        refuse(at(f"{name}:1"), out, (IntegrityError, EnvironmentMissing), ".", trusting(made))
    path.write_bytes(data)
    artifact.pull(at(f"{name}:1"), out, trusting(made))


@needs_registry
def test_who_may(made, tmp_path):
    """With a password that the registry asks for."""
    (tmp_path / "htpasswd").write_text(f"release:{BCRYPT}\n")
    lines = f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/htpasswd}}}}\n"
    process, place = serve(tmp_path, lines)
    try:
        name = f"{place}/models/tiny:1"
        for environment in ({}, {USER: "release", PASSWORD: "wrong"}):
            with pytest.raises(EnvironmentMissing, match="does not let us"):
                artifact.push(made / "s1.bundle.tar", at(name, environment))
        mine = {USER: "release", PASSWORD: SECRET}
        assert artifact.push(made / "s1.bundle.tar", at(name, mine))["sent"] > 0
        artifact.pull(at(name, mine), tmp_path / "x.bundle.tar", trusting(made))
    finally:
        process.kill()
        process.wait()


class Gate(http.server.BaseHTTPRequestHandler):
    """What registries with token servers say: who are you, here is your token, look over there."""

    seen: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        said = self.headers.get("Authorization", "")
        Gate.seen.append((self.path, said))
        here = f"http://{self.headers['Host']}"
        if self.path.startswith("/token"):
            token = "both" if "push" in self.path else "abc"
            self.answer(200, {}, json.dumps({"token": token}).encode())
        elif self.path.startswith("/elsewhere"):
            self.answer(200, {}, b"content")
        elif self.path.startswith("/v2/a/lost"):
            self.answer(307, {"Location": here.replace("127.0.0.1", "localhost") + "/greedy"}, b"")
        elif self.path.startswith("/greedy"):
            self.answer(401, {"WWW-Authenticate": f'Bearer realm="{here}/token"'}, b"")
        elif self.path.startswith("/v2/a/nowhere"):
            self.answer(307, {"Location": "https://[bad/"}, b"")
        elif self.command == "POST" and said == "Bearer both":
            self.answer(202, {}, b"")
        elif said != "Bearer abc" or self.command == "POST":
            scope = "pull,push" if self.command == "POST" else "pull"
            challenge = f'Bearer realm="{here}/token",service="s",scope="repository:a:{scope}"'
            self.answer(401, {"WWW-Authenticate": challenge}, b"")
        else:
            other = here.replace("127.0.0.1", "localhost")
            self.answer(307, {"Location": f"{other}/elsewhere?signed=1"}, b"")

    def do_POST(self) -> None:
        self.do_GET()

    def answer(self, code: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words) -> None:
        pass


def test_tokens_and_redirects():
    """A password goes for a token, a token to the registry, and neither to another host."""
    with http.server.HTTPServer(("127.0.0.1", 0), Gate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = at(f"127.0.0.1:{server.server_port}/a:1", {USER: "u", PASSWORD: "p"})
        with place.ask("GET", "blobs/sha256:0") as answer:
            assert answer.read() == b"content"
        seen = list(Gate.seen)
        # A token to read with is none to write with: who we are is proven again.
        place.ask("POST", "blobs/uploads/", good=(202,)).close()
        fresh = at(f"127.0.0.1:{server.server_port}/a:1", {USER: "u", PASSWORD: "p"})
        Gate.seen.clear()
        with pytest.raises(EnvironmentMissing, match="does not let us"):
            fresh.ask("GET", "lost")
        assert [path for path, _ in Gate.seen] == [
            "/v2/a/lost",
            "/greedy",
        ]  # and no token asked for
        with pytest.raises(EnvironmentMissing, match="no URL"):
            fresh.ask("GET", "nowhere")
        server.shutdown()
    assert seen == [
        ("/v2/a/blobs/sha256:0", ""),
        ("/token?service=s&scope=repository%3Aa%3Apull", "Basic dTpw"),  # base64 of u:p
        ("/v2/a/blobs/sha256:0", "Bearer abc"),
        ("/elsewhere?signed=1", ""),
    ]


def test_references():
    one = parse(f"[::1]:5000/a/b__c.d:1.4.0_arm@sha256:{'0' * 64}")
    assert (one.host, one.port, one.name, one.tag) == ("[::1]", 5000, "a/b__c.d", "1.4.0_arm")
    assert str(one) == f"[::1]:5000/a/b__c.d:1.4.0_arm@sha256:{'0' * 64}"
    for text in (
        "keyword",
        "host/A",
        "host/a:",
        "host/a/../b",
        "host/a:x@sha256:12",
        "host/a b",
        "host:99999/a:1",
    ):
        with pytest.raises(UsageError, match="names no artifact"):
            parse(text)
    assert is_loopback("localhost") and is_loopback("127.9.9.9") and is_loopback("[::1]")
    assert not is_loopback("registry.example.com") and not is_loopback("10.0.0.1")


def test_no_way_out_of_tls(made, tmp_path):
    with pytest.raises(UsageError, match="on this machine"):
        Registry(parse("registry.example.com/a:1"), True, {})
    place = Registry(parse(f"127.0.0.1:{free_port()}/a:1"), False, {})
    with pytest.raises(EnvironmentMissing, match="cannot be reached"):
        artifact.pull(place, tmp_path / "x.bundle.tar", None)
    with pytest.raises(EnvironmentMissing, match="out of TLS"):
        place.send("GET", "http://127.0.0.1/v2/", {}, None, "")
    with pytest.raises(UsageError, match="a tag, and no digest"):
        artifact.push(made / "s1.bundle.tar", Registry(parse("localhost/a"), True, {}))
