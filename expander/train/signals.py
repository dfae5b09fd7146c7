"""Stop requests: the first signal waits for the end of the step, a second acts at once.

A closed terminal (SIGHUP) and output that nobody reads any more are requests to stop, too.
"""

import signal

from expander import cli


class StopRequest:
    """While entered, remembers the first signal in `received` instead of acting on it.

    Args:
        announce: whether this process tells the user that it stops after the step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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
            cli.tell("\nstopping after this step")

    def output_lost(self, error: OSError) -> None:
        """Handle a failed write to stdout: stop if its reader is gone, else continue without it."""
        cli.silence("stdout")
        if isinstance(error, BrokenPipeError):
            self.received = self.received or signal.SIGPIPE
        else:
            cli.tell(f"warning: stdout cannot be written ({error.strerror}); no more step lines")
