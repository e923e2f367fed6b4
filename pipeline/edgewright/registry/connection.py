"""Talking to a registry: HTTP with the ways of proving who asks that registries know.

TLS everywhere but on this machine itself, where the user may ask for plain HTTP. A user name and
password come from the environment; they go to the registry and to the place it names for tokens,
never along with a redirect to another host.
"""

import base64
import http.client
import json
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError
from edgewright.registry.reference import Reference, is_loopback

USER, PASSWORD = "EDGEWRIGHT_REGISTRY_USER", "EDGEWRIGHT_REGISTRY_PASSWORD"
TIMEOUT_S = 60
MAX_REDIRECTS = 5
MAX_ANSWER = 4 << 20  # bytes of an answer that is read into memory; what the specification asks for
CHALLENGE = re.compile(r'([a-z]+)="([^"]*)"')
Response = http.client.HTTPResponse


class Registry:
    """One repository of a registry. `plain`: HTTP without TLS, on this machine only."""

    def __init__(self, place: Reference, plain: bool, environment: Mapping[str, str]) -> None:
        if plain and not is_loopback(place.host):
            raise UsageError(
                f"--plain-http to {place.host}",
                expected="a registry on this machine (localhost, 127.0.0.1, [::1])",
                hint="leave it out: other registries are reached by TLS",
            )
        self.place = place
        port = "" if place.port is None else f":{place.port}"
        self.base = f"{'http' if plain else 'https'}://{place.host}{port}/v2/{place.name}/"
        self.authorization = ""
        user, password = environment.get(USER, ""), environment.get(PASSWORD, "")
        self.basic = ""
        if user or password:
            self.basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] = {},
        body: bytes | Iterable[bytes] | None = None,
        good: tuple[int, ...] = (200,),
    ) -> Response:
        """The answer to a request to a path of the repository (or to a URL it named).

        Where the registry wants to know who asks, that is proven and the request sent again,
        unless its body cannot be. BadInput for what is not there, EnvironmentMissing where the
        registry cannot be reached or refuses.
        """
        url = joined(self.base, path)
        asked = False  # who we are; again in every request: what we may do, and until when, differs
        for _ in range(MAX_REDIRECTS):
            answer = self.send(method, url, headers, body, self.authorization)
            ours = urlsplit(url)[:2] == urlsplit(self.base)[:2]
            if answer.status == 401 and ours and not asked and not is_stream(body):
                self.authorization = self.proven(answer.headers.get("WWW-Authenticate", ""))
                asked = True
                answer.close()
                continue
            if answer.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                url = joined(url, answer.headers.get("Location", ""))
                answer.close()
                continue
            if answer.status in good:
                return answer
            raise self.refusal(method, url, answer)
        raise EnvironmentMissing(f"{self.place} sends from place to place", found=shown(url))

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None,
        authorization: str,
    ) -> Response:
        """One request on a connection of its own, which ends with the answer."""
        parts = urlsplit(url)
        ours = urlsplit(self.base)
        if parts.scheme != "https" and not (parts.scheme == "http" == ours.scheme):
            raise EnvironmentMissing(f"{self.place} leads out of TLS", found=shown(url))
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise EnvironmentMissing(f"{self.place} leads to plain HTTP", found=shown(url))
        sent = {"User-Agent": "edgewright", **headers}
        if authorization and (parts.scheme, parts.netloc) == (ours.scheme, ours.netloc):
            sent["Authorization"] = authorization
        kind = http.client.HTTPSConnection if parts.scheme == "https" else plain_connection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, target or "/", body, {**sent, "Connection": "close"})
            return connection.getresponse()
        except (OSError, http.client.HTTPException, ssl.SSLError, ValueError) as error:
            connection.close()
            raise EnvironmentMissing(
                f"the registry {parts.netloc} cannot be reached",
                found=" ".join(str(error).split())[:200] or type(error).__name__,
                hint="check its name and the network; --plain-http where it is on this machine "
                "and without TLS",
            ) from None

    def proven(self, challenge: str) -> str:
        """What to say to the registry after it asked who we are; see RFC 6750 and its scheme."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic" and self.basic:
            return self.basic
        if kind.lower() == "bearer":
            asked = dict(CHALLENGE.findall(rest))
            words = {key: asked[key] for key in ("service", "scope") if key in asked}
            url = joined(asked.get("realm", ""), "?" + urlencode(words))
            headers = {"Authorization": self.basic} if self.basic else {}
            answer = self.send("GET", url, headers, None, "")
            if answer.status == 200:
                found = parsed(small(answer), f"token of {self.place.host}")
                token = found.get("token") or found.get("access_token")
                if isinstance(token, str) and token.isascii() and token.isprintable():
                    return f"Bearer {token}"
        raise self.denied()

    def denied(self) -> EnvironmentMissing:
        return EnvironmentMissing(
            f"{self.place.host} does not let us at {self.place.name}",
            hint=f"set {USER} and {PASSWORD}, of a user who may",
        )

    def refusal(self, method: str, url: str, answer: Response) -> Exception:
        """The registry's no, as one of our errors."""
        if answer.status in (401, 403):
            return self.denied()
        if answer.status == 404:
            return BadInput(f"{self.place} is not in the registry", hint="check name and tag")
        text = answer.read(1 << 12).decode("utf-8", "replace")
        return EnvironmentMissing(
            f"the registry refused {method} {shown(urlsplit(url).path)}",
            found=f"status {answer.status} {shown(text)}".rstrip(),
        )


def plain_connection(host: str, port: int | None, timeout: float) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(host, port, timeout=timeout)


def joined(base: str, place: str) -> str:
    """A URL, or a path beside one; EnvironmentMissing for what is none."""
    try:
        url = urljoin(base, place)
        _ = urlsplit(url).port  # is read, and judged, only when asked for
    except ValueError:
        raise EnvironmentMissing(
            "the registry names a place that is no URL", found=shown(place)
        ) from None
    return url


def is_stream(body: object) -> bool:
    """Whether a body can be sent but once."""
    return body is not None and not isinstance(body, bytes)


def shown(text: str) -> str:
    """What a server said, in a message: one line, cut."""
    return ascii(" ".join(text.split()))[1:-1][:200]


def small(answer: Response) -> bytes:
    """An answer that fits in memory; IntegrityError for a longer one."""
    try:
        data = answer.read(MAX_ANSWER + 1)
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentMissing("the registry broke off its answer", found=str(error)) from None
    finally:
        answer.close()
    if len(data) > MAX_ANSWER:
        raise IntegrityError("an answer of the registry", expected=f"at most {MAX_ANSWER} bytes")
    return data


def parsed(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; IntegrityError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise IntegrityError(f"the {what}", expected="a JSON object", found=shown(repr(data[:80])))
    return value
