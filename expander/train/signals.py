"""Stop requests: the first SIGINT or SIGTERM waits for the end of the step, a second acts at once."""

import signal
import sys


class StopRequest:
    """While entered, remembers the first signal in `received` instead of acting on it.

    Args:
        announce: whether this process tells the user that it stops after the step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, announce: bool):
        self.announce = announce
        self.received = 0
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum, frame) -> None:
        self.received = signum
        signal.signal(signum, self._previous[signum])
        if self.announce:
            print("\nstopping after this step", file=sys.stderr, flush=True)
