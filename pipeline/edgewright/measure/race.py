"""The race: candidate and original take turns on the same core, in child processes of their own.

Stored times of an earlier day are worthless on a shared machine (one model's median moved by a
factor of 3 between windows of 10 s), and so are two processes running side by side. What survives
is the ratio of two slices that follow each other on one core: a pair.

A process keeps for life what it got when it started: the layout of its memory shifts it by about
1 %, and of several processes started in a row the later ones are faster, by up to 6 % for a model
with 90 MB of weights (measured with equal models). So a launch has two heats with children of
their own, started in opposite orders, and only their mean counts.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.data import Feed
from edgewright.errors import BadInput, DeviceUnavailable, EnvironmentMissing
from edgewright.runtime.engines import engine_options
from edgewright.runtime.launch import session_options
from edgewright.runtime.providers import COMPILING
from edgewright.runtime.session import NVIDIA, Launch, Session
from edgewright.target import Target

CANDIDATE, ORIGINAL = "candidate", "original"
SIDES = (CANDIDATE, ORIGINAL)

SLICE_S = 0.08  # long enough to hide the switch between processes, short against host noise
MIN_CALLS, MAX_CALLS = 4, 200  # of one slice
SLOW_S = 0.25  # a call this long is a slice of its own
MIN_PAIRS, MAX_PAIRS = 12, 25  # of one heat
WARM_CALLS, WARM_S, WARM_MAX_S = 30, 0.2, 1.0
CAP = 2.0  # a heat ends after this many times its seconds, whatever it has
SLOW_CAP = 20 / 3  # the same for slow models: 20 s for a launch of 3 s, 60 s for three
SPIN_COUNT = 200_000  # of the noise probe: about 2 ms
RESTART_S, LEAST_RESTARTS = 0.5, 3  # of one heat
MEMORY_RUNS = (3, 5)  # to reach the peak: inputs of one size, inputs of several sizes
MEMORY_S = 5.0  # after these, two runs are enough


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a heat spends its time. None: the constants above.

    slice_s: of one slice, CPU time on a core of its own. pairs: least and most of a heat.
    restarts: sessions created anew on each side after the pairs.
    """

    slice_s: float | None = None
    pairs: tuple[int, int] | None = None
    restarts: int = 0


STEADY = Pace()


class CandidateFailed(BadInput):
    """The candidate, not the original nor the machine, broke the measurement."""


@contextmanager
def blame(side: str) -> Iterator[None]:
    """Turn what the candidate's process raises into CandidateFailed; leave the original's.

    A device or a link that fails says nothing about the model in it.
    """
    try:
        yield
    except DeviceUnavailable:
        raise
    except (BadInput, EnvironmentMissing) as error:
        if side == ORIGINAL:
            raise
        raise CandidateFailed(str(error)) from error


def open_side(side: str, model: Path, target: Target, launch: Launch, **options: Any) -> Session:
    """A session of one side with the target's options and those given."""
    settings = session_options(target)
    if launch.engines is not None:
        settings["provider_options"] |= engine_options(target, model, launch.engines)
    with blame(side):
        return Session(
            model,
            launch=launch,
            name=f"the {side} ({model.name})",
            **{**settings, **options},
        )


def ask(side: str, session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of one side's child."""
    with blame(side):
        return session.ask(request)[0]


def feed_bytes(feed: Feed) -> int:
    """Size of a sample; samples of one size are expected to take equally long."""
    return sum(array.nbytes for array in feed.values())


def memory_request(feeds: list[Feed], target: Target) -> dict[str, Any]:
    """The request for the peak of memory: the largest inputs first; of a GPU, too."""
    on_gpu = target.runtime.provider in NVIDIA
    return {"op": "memory", "order": memory_order(feeds), "seconds": MEMORY_S, "device": on_gpu}


def memory_order(feeds: list[Feed]) -> list[int]:
    """Feeds for the peak of memory, by number: the largest first where sizes differ."""
    sizes = [feed_bytes(feed) for feed in feeds]
    same, different = MEMORY_RUNS
    if len(set(sizes)) == 1:
        return [k % len(feeds) for k in range(same)]
    largest = sorted(range(len(feeds)), key=lambda k: -sizes[k])
    return [largest[k % len(largest)] for k in range(different)]


def warm_calls(first_run_s: float) -> int:
    """Calls of warm-up: 30, or what fits in a second, at least one."""
    return max(1, min(WARM_CALLS, int(WARM_MAX_S / max(first_run_s, 1e-9))))


def calls_per_slice(latencies_s: list[float], pace: Pace = STEADY) -> int:
    """Calls of a slice, the same for both sides so that both see the same inputs."""
    if max(latencies_s) > SLOW_S:
        return 1
    mean = sum(latencies_s) / len(latencies_s)
    return max(MIN_CALLS, min(MAX_CALLS, math.ceil((pace.slice_s or SLICE_S) / max(mean, 1e-9))))


def start(side: str, session: Session, feeds: list[Feed], target: Target) -> dict[str, Any]:
    """Cold start and peak memory of a fresh child, then its warm-up.

    The peak is reset after loading and before the first run; the arena grows on the second run.
    A compiling provider sees every input once before any is timed: it may compile for each size.
    """
    with blame(side):
        session.keep_feeds(feeds)
    memory = ask(side, session, memory_request(feeds, target))
    if target.runtime.provider in COMPILING:
        memory["compile_s"] = round(sum(ask(side, session, {"op": "warm"})["wall_s"]), 6)
    request = {"op": "slice", "seconds": WARM_S, "min_runs": warm_calls(memory["first_run_s"])}
    warm = ask(side, session, request)
    kept = ("import_s", "load_s", "rss_before_load_kib", "peak_after_load_kib")
    return {
        **{key: session.info[key] for key in kept},
        **memory,
        "ready_s": session.ready_s,
        "warm_runs": len(warm["wall_s"]),
        "latency_s": sorted(warm["wall_s"])[len(warm["wall_s"]) // 2],
    }


def take_slice(side: str, session: Session, calls: int, turn: int) -> dict[str, Any]:
    """One slice: times of every call in microseconds, and what disturbed it."""
    request = {"op": "slice", "seconds": 0, "min_runs": calls, "turn": turn}
    answer = ask(side, session, request)
    return {
        "wall_us": [round(t * 1e6, 2) for t in answer["wall_s"]],
        "cpu_us": [round(t * 1e6, 2) for t in answer["cpu_s"]],
        "total_wall_s": round(answer["total_wall_s"], 7),
        "run_queue_s": round(answer["run_queue_s"], 7),
        "involuntary_switches": answer["involuntary_switches"],
        "steal_ticks": answer["steal_ticks"],
    }


def take_restarts(
    sessions: dict[str, Session], order: random.Random, most: int
) -> list[dict[str, Any]]:
    """Pairs of restarts: each side creates its session anew and runs it once, in turns.

    As many as fit in RESTART_S, at least LEAST_RESTARTS, at most `most`.
    """
    pairs: list[dict[str, Any]] = []
    begin = time.monotonic()
    while len(pairs) < most:
        if len(pairs) >= LEAST_RESTARTS and time.monotonic() - begin > RESTART_S:
            break
        first, second = order.sample(SIDES, 2)
        pair: dict[str, Any] = {"first": first}
        for side in (first, second):
            answer = ask(side, sessions[side], {"op": "restart"})
            pair[side] = {key: round(answer[key], 7) for key in ("wall_s", "cpu_s")}
        pairs.append(pair)
    return pairs


def finished(pairs: int, elapsed: float, seconds: float, calls: int, pace: Pace = STEADY) -> bool:
    """Whether a heat has run long enough."""
    least, most = pace.pairs or (MIN_PAIRS, MAX_PAIRS)
    cap = seconds * (SLOW_CAP if calls == 1 else CAP)
    enough = pairs >= least and elapsed >= seconds
    return enough or pairs >= most or (elapsed >= cap and pairs >= 2)


def run_launch(
    number: int,
    models: dict[str, Path],
    feeds: list[Feed],
    target: Target,
    launch: Launch,
    cores: frozenset[int],
    seconds: float,
    seed: int,
    tell_pairs: Callable[[int], None],
    pace: Pace = STEADY,
) -> list[dict[str, Any]]:
    """Two heats of about half the seconds each on `cores`, the original and the candidate first."""
    heats: list[dict[str, Any]] = []
    for first in (ORIGINAL, CANDIDATE):
        order = random.Random(f"{seed} {number} {first}")
        before = len(heats) * MIN_PAIRS

        def tell_heat(pairs: int, before: int = before) -> None:
            tell_pairs(before + min(pairs, MIN_PAIRS))

        heat = run_heat(
            first, models, feeds, target, launch, cores, order, seconds / 2, tell_heat, pace
        )
        heats.append({"launch": number, **heat})
    return heats


def run_heat(
    started_first: str,
    models: dict[str, Path],
    feeds: list[Feed],
    target: Target,
    launch: Launch,
    cores: frozenset[int],
    order: random.Random,
    seconds: float,
    tell_pairs: Callable[[int], None],
    pace: Pace = STEADY,
) -> dict[str, Any]:
    """Start both children on `cores` and let them take turns for about `seconds`.

    Only one child is active at any time. The first pair is dropped, unless a slice is a single
    slow call. Call k of a slice runs feed number (turn + k) modulo their number, on both sides.
    Which side goes first in a pair is drawn from `order`.
    """
    with ExitStack() as stack:
        sessions, starts = {}, {}
        for side in sorted(SIDES, key=lambda side: side != started_first):
            session = open_side(side, models[side], target, launch, cores=cores)
            sessions[side] = stack.enter_context(session)
            starts[side] = start(side, session, feeds, target)
        calls = calls_per_slice([starts[side]["latency_s"] for side in SIDES], pace)
        pairs: list[dict[str, Any]] = []
        spins: list[float] = []
        turn = 0
        begin = time.monotonic()
        while not finished(len(pairs), time.monotonic() - begin, seconds, calls, pace):
            first, second = order.sample(SIDES, 2)
            pair: dict[str, Any] = {"turn": turn, "first": first}
            for side in (first, second):
                pair[side] = take_slice(side, sessions[side], calls, turn)
            if turn > 0 or calls == 1:
                pairs.append(pair)
            probe = ask(ORIGINAL, sessions[ORIGINAL], {"op": "spin", "count": SPIN_COUNT})
            spins.append(round(probe["wall_s"], 7))
            turn += calls
            tell_pairs(len(pairs))
        restarts = take_restarts(sessions, order, pace.restarts)
    return {
        "started_first": started_first,
        "cores": sorted(cores),
        "calls": calls,
        "feed_bytes": [feed_bytes(feed) for feed in feeds],
        "start": starts,
        "spin_s": spins,
        "restarts": restarts,
        "pairs": pairs,
    }


def no_arena_peak_kib(
    side: str,
    model: Path,
    feeds: list[Feed],
    target: Target,
    launch: Launch,
    cores: frozenset[int],
) -> tuple[int, bool]:
    """Peak KiB of one side without the memory arena (largest of three), and if it was reset.

    Devices often switch the arena off: it keeps what the largest input once needed.
    """
    request = memory_request(feeds, target)
    with open_side(side, model, target, launch, cores=cores, arena=False) as session:
        with blame(side):
            session.keep_feeds(feeds)
        answers = [ask(side, session, request) for _ in range(3)]
    return max(a["peak_kib"] for a in answers), all(a["reset"] for a in answers)
