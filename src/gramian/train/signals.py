"""Stopping long work without loss: a signal asks, the work finishes its step and saves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Yield a function that names the signal that asked to stop, or gives None.

    SIGINT (Ctrl-C) and SIGTERM are caught inside the block; a second Ctrl-C interrupts at once. Outside the
    main thread no signal can be caught and the function always gives None.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
