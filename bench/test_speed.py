"""`make bench`: how long pieces of this program take here and now, by pytest-benchmark.

What it stores is for reading; two versions are compared by `bench/compare.py` only, in turns.
No time is asserted.
"""

import pytest
from pieces import CALLS, PIECES, SAMPLES, bare, cpu_s, runner

ROUNDS = {"start": 5, "calibration": 10, "runner": 10}


@pytest.mark.parametrize("name", PIECES)
def test_piece(name, benchmark, tmp_path):
    work = PIECES[name](tmp_path)
    begin = cpu_s()
    benchmark.pedantic(work, rounds=ROUNDS.get(name, 3), warmup_rounds=1)
    spent = (cpu_s() - begin) / (ROUNDS.get(name, 3) + 1)
    benchmark.extra_info["cpu_s"] = spent
    if name == "calibration":
        benchmark.extra_info["samples_per_cpu_s"] = SAMPLES / spent


def test_what_the_runner_adds_to_a_call(benchmark, tmp_path):
    """The child process against a bare loop, in turns: microseconds of CPU for each call."""
    folders = [tmp_path / name for name in ("child", "bare")]
    for folder in folders:
        folder.mkdir()
    ours, theirs = runner(folders[0]), bare(folders[1])
    spent = []

    def turn() -> None:
        begin = cpu_s()
        ours()
        middle = cpu_s()
        theirs()
        spent.append(((middle - begin) / CALLS, (cpu_s() - middle) / CALLS))

    benchmark.pedantic(turn, rounds=10, warmup_rounds=1)
    added = sorted(1e6 * (a - b) for a, b in spent[1:])
    benchmark.extra_info["added_us_of_cpu_per_call"] = added[len(added) // 2]
    benchmark.extra_info["bare_us_of_cpu_per_call"] = 1e6 * sorted(b for _, b in spent)[5]
