"""The processes of one run, by accelerate: plain python, `accelerate launch` and torchrun alike."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lmleak.errors import RunError

if TYPE_CHECKING:
    from accelerate import PartialState

#: A rank that is done waits for the slowest one. gloo gives up after 30 minutes, NCCL after 10: a unit may take longer.
_PATIENCE = timedelta(days=30)


def join() -> PartialState:
    """This process's place among the ranks; one alone where nothing launched several.

    Raises:
        RunError: launched as several processes, of which accelerate knows nothing.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    world = int(os.environ.get("WORLD_SIZE", "1"))
    # PartialState itself does not read ACCELERATE_USE_CPU, and without it takes a CPU-only torchrun for lone processes.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (world > 1 and not torch.accelerator.is_available())
    state = PartialState(cpu=cpu, timeout=_PATIENCE) if world > 1 else PartialState(cpu=cpu)
    if world != state.num_processes:
        raise RunError(
            f"launched as {world} processes, but accelerate was set up for {state.num_processes} before the run began; "
            "call run() before anything that picks a device, or set ACCELERATE_USE_CPU=true"
        )
    return state


def share(state: PartialState, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if state.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def wait(state: PartialState, stop: Stop) -> None:
    """Waits until every rank has done its units.

    Raises:
        RunError: another rank has died.
    """
    try:
        state.wait_for_everyone()
    except RuntimeError as error:
        if not stop.asked:
            raise RunError("another process of this run ended early; the same command goes on from here") from error


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
