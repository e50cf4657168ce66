"""How long `bnfctl --help` takes: pytest -m bench tests/benchmarks/test_help.py -s

Against `python -c pass` on the same machine in the same minute, since machines and their load differ.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.bench


def seconds(*args: str, runs: int = 9) -> float:
    """Median wall-clock seconds of a process."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *args], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("verb", ["", "generate", "score", "build", "train", "eval", "run", "ls", "doctor"])
def test_help_takes_under_half_a_second_on_a_quiet_machine(verb: str) -> None:
    bare = seconds("-c", "pass")
    help_ = seconds("-m", "bnfctl", *([verb] if verb else []), "--help")
    print(f"\nbnfctl {verb} --help: {help_:.3f} s, {help_ / bare:.1f} times a bare interpreter ({bare:.3f} s)")
    assert help_ < 0.5
