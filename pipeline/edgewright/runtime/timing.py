"""A quick look at which of two models is faster, for decisions while building.

The numbers of a report come from `measure`; this is its cheap relative inside one process.
"""

import statistics
import time
from pathlib import Path

import onnx

from edgewright.data import Feed
from edgewright.runtime.local import Local, open_local

SECONDS = 1.5
PAIRS = 9


def cpu_ratio(candidate: onnx.ModelProto | Path, original: Path, feeds: list[Feed]) -> float:
    """Median over PAIRS alternating slices of CPU time candidate / original, one thread each."""
    source = candidate if isinstance(candidate, Path) else candidate.SerializeToString()
    sessions = [open_local(source), open_local(original)]
    for session in sessions:
        spend(session, feeds, 0.05)
    length = SECONDS / (2 * PAIRS)
    ratios = []
    for k in range(PAIRS):
        order = sessions if k % 2 == 0 else sessions[::-1]
        times = {id(s): spend(s, feeds, length) for s in order}
        ratios.append(times[id(sessions[0])] / times[id(sessions[1])])
    return statistics.median(ratios)


def spend(session: Local, feeds: list[Feed], seconds: float) -> float:
    """CPU seconds of one pass over the feeds, passes repeated for about `seconds`."""
    begin, cpu, passes = time.perf_counter(), time.process_time(), 0
    while passes == 0 or time.perf_counter() - begin < seconds:
        for feed in feeds:
            session.run(feed)
        passes += 1
    return (time.process_time() - cpu) / passes
