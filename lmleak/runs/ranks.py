"""The processes of one run, by accelerate: plain python, `accelerate launch` and torchrun alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import PartialState

#: A rank that is done waits for the slowest one. gloo gives up after 30 minutes, NCCL after 10: a unit may take longer.
_PATIENCE = timedelta(days=30)


def join() -> PartialState:
    """This process's place among the ranks; one alone where nothing launched several."""
    from accelerate import PartialState

    return PartialState() if _alone() else PartialState(timeout=_PATIENCE)


def _alone() -> bool:
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) <= 1


def share(state: PartialState, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if state.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


class Stop:
    """Whether to end after the unit at hand: asked for by SIGTERM, which is how launchers and schedulers say it."""

    asked = False


@contextmanager
def graceful() -> Iterator[Stop]:
    """SIGTERM lets the unit at hand finish. torchrun sends it to the others when one worker dies."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return

    def ask(number: int, frame: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
