import sys
from pathlib import Path

import pytest

from benchmarks.compilation_meter import PhaseClock, origin

CLOCK_OF_TWO_THREADS = [
    ("enter", "tracing", 1, 1.0),  # running until here
    ("enter", "compiling", 1, 3.0),  # inside of tracing
    ("leave", "compiling", 1, 7.0),
    ("enter", "lowering", 2, 8.0),  # beside tracing
    ("leave", "tracing", 1, 10.0),
    ("leave", "lowering", 2, 16.0),
]


def test_each_second_is_counted_once() -> None:
    now = 0.0
    clock = PhaseClock(lambda: now)
    for what, phase, thread, moment in CLOCK_OF_TWO_THREADS:
        now = moment
        if what == "enter":
            clock.enter(phase, thread)
        else:
            clock.leave(thread)
    now = 20.0
    found = clock.read()
    assert found == {"importing": 0.0, "tracing": 2 + 1 + 1, "compiling": 4, "lowering": 1 + 6, "running": 1 + 4}
    assert sum(found.values()) == now


@pytest.mark.parametrize("inside", [True, False])
def test_the_origin_is_the_innermost_frame_of_the_checkout(*, inside: bool) -> None:
    here = Path(__file__)
    root = here.parents[1] if inside else here.parent / "elsewhere"
    frame = sys._getframe()
    found = origin(frame, root)
    expected = f"benchmarks/{here.name}:{frame.f_lineno - 1}" if inside else "the caller"
    assert found.split(" < ")[0] == expected
