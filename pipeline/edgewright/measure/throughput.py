"""Inferences per second: of one process with more threads, and of more processes at once.

Wall time of the whole machine, so neighbours count: a figure to plan with, which no gate uses.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.data import Feed
from edgewright.measure.race import CANDIDATE, ask, blame, open_side
from edgewright.runtime.session import Launch, Session
from edgewright.target import Target

ROUNDS, ROUND_S = 3, 0.3
WARM_RUNS = 5


def throughput(
    model: Path, feeds: list[Feed], target: Target, launch: Launch, cores: list[int]
) -> dict[str, Any]:
    """Rows of {"threads" or "streams": N, "per_second": median of the rounds, "rounds": [...]}.

    N is 1, 2, 4, ... up to the number of cores. A stream is a process with one thread on a core
    of its own; all streams run at the same time. One stream is one thread, and measured once.
    """
    counts = sorted({*(2**k for k in range(len(cores).bit_length()) if 2**k <= len(cores))})
    counts += [len(cores)] if len(cores) not in counts else []
    one = rates([cores[:1]], 1, model, feeds, target, launch)
    return {
        "threads": [
            {"threads": 1, **one},
            *(
                {"threads": n, **rates([cores[:n]], n, model, feeds, target, launch)}
                for n in counts[1:]
            ),
        ],
        "streams": [
            {"streams": 1, **one},
            *(
                {"streams": n, **rates([[c] for c in cores[:n]], 1, model, feeds, target, launch)}
                for n in counts[1:]
            ),
        ],
        "round_s": ROUND_S,
    }


def rates(
    places: list[list[int]],
    threads: int,
    model: Path,
    feeds: list[Feed],
    target: Target,
    launch: Launch,
) -> dict[str, Any]:
    """Inferences per second of a process on each place (a set of cores), all at the same time."""
    with ExitStack() as stack, ThreadPoolExecutor(len(places)) as pool:
        sessions = []
        for place in places:
            session = open_side(
                CANDIDATE, model, target, launch, cores=frozenset(place), threads=threads
            )
            sessions.append(stack.enter_context(session))
            with blame(CANDIDATE):
                session.keep_feeds(feeds)
            ask(CANDIDATE, session, {"op": "slice", "seconds": 0, "min_runs": WARM_RUNS})

        def one(session: Session) -> float:
            answer = ask(CANDIDATE, session, {"op": "slice", "seconds": ROUND_S})
            return len(answer["wall_s"]) / float(answer["total_wall_s"])

        rounds = [sum(pool.map(one, sessions)) for _ in range(ROUNDS)]
    return {"per_second": float(np.median(rounds)), "rounds": [round(r, 3) for r in rounds]}
