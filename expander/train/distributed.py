"""One training run on several Macs: `mlx.launch -n 2 --backend ring -- python train.py sft`.

Every rank processes its share of each step's rows or prompts, and the ranks exchange the results, so
all of them make the same decisions and hold the same weights. Only rank 0 prints and writes; a run
starts from what rank 0 has, so the other Macs need no checkpoint. With a single process, each
function here returns its argument.

The ring may hang (mlx #4475), and a Mac may vanish without closing its connections; see `watch`.
"""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from expander import cli
from expander.files import json_digest

CONNECT_SECONDS = 60
# The longest time between two exchanges before the run is considered hung.
TIMEOUT_SECONDS = 300
LOSS = "the connection to another rank was lost"

_last_exchange = 0.0


def rank() -> int:
    return mx.distributed.init().rank()


def size() -> int:
    return mx.distributed.init().size()


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return rank() == 0


def warn(text: str) -> None:
    """Print a warning on rank 0."""
    if is_main():
        cli.tell(f"warning: {text}")


@contextmanager
def joined() -> Iterator[None]:
    """Connect to the other ranks that mlx.launch started, if any.

    Raises:
        ConnectionError: another rank does not answer, or was lost before training began.
    """
    if "MLX_RANK" in os.environ:
        _connect()
    if size() > 1:
        print(f"training on {size()} ranks")
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise ConnectionError(LOSS) from None


def _connect() -> None:
    deadline = time.monotonic() + CONNECT_SECONDS
    # While MLX waits for another rank it blocks all Python threads; this timer needs none.
    faulthandler.dump_traceback_later(2 * CONNECT_SECONDS, exit=True)
    try:
        while True:
            try:
                mx.distributed.init(strict=True)
                return
            except RuntimeError as error:
                # MLX gives up on a rank that is 15 seconds late; retry until the deadline.
                if "Couldn't connect" not in str(error) or time.monotonic() > deadline:
                    raise ConnectionError(f"cannot connect to the other ranks: {error}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_loss(error: BaseException | None) -> bool:
    """Whether MLX reported, in a collective operation, that another rank's process has ended."""
    return isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)


def _all_gather(array: np.ndarray) -> np.ndarray:
    """Concatenate the arrays (N, ...) of all ranks to (ranks x N, ...)."""
    global _last_exchange
    gathered = mx.distributed.all_gather(mx.array(array), stream=mx.cpu)
    mx.eval(gathered)
    _last_exchange = time.monotonic()
    return np.array(gathered)


def gather(value) -> list:
    """The values of all ranks, in the order of the ranks; any JSON value."""
    if size() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = _all_gather(np.array([data.size]))
    padded = np.zeros((1, lengths.max()), np.uint8)
    padded[0, : data.size] = data
    return [json.loads(bytes(row[:n])) for row, n in zip(_all_gather(padded), lengths, strict=True)]


def barrier() -> None:
    """Wait until every rank has reached this point."""
    gather(None)


def share_out(items: Sequence) -> Sequence:
    """This rank's consecutive share of `items`; shares differ in length by one at most.

    `collect` concatenates the shares of all ranks again.
    """
    first, last = (len(items) * n // size() for n in (rank(), rank() + 1))
    return items[first:last]


def collect(part: list) -> list:
    """Concatenate the lists of all ranks."""
    return [item for items in gather(part) for item in items]


def all_sum(tree):
    """Sum a tree of float32 arrays over the ranks, and evaluate it."""
    if size() == 1:
        return tree
    # Evaluate GPU work first: Metal kills a command that waits 5 seconds for another rank.
    mx.eval(tree)
    with mx.stream(mx.cpu):
        summed = tree_map(lambda mean: mean * size(), average_gradients(tree))
        mx.eval(summed)
    return summed


def broadcast(tree):
    """Replace this rank's arrays by those of rank 0, which have the same names and shapes."""
    received = {}
    with mx.stream(mx.cpu):
        # In the order of the names: a loaded tree has another order than a new one, and ranks that
        # send each other different arrays wait forever.
        for name, array in sorted(tree_flatten(tree), key=lambda item: item[0]):
            received[name] = mx.distributed.all_sum(array if rank() == 0 else mx.zeros_like(array))
            mx.eval(received[name])
    return tree_map_with_path(lambda name, _: received[name], tree)


def check_same(**values) -> None:
    """Fail on every rank if the values differ between ranks.

    Raises:
        ValueError: with the names of the values that differ.
    """
    if size() == 1:
        return
    prints = {name: json_digest(value) for name, value in values.items()}
    others = gather(prints)
    differing = [name for name in prints if any(other[name] != prints[name] for other in others)]
    if differing:
        raise ValueError(
            f"the ranks have different {' and '.join(differing)}; copy the project's folder, its data "
            "and its outputs from the first Mac to the others"
        )


def watch(give_up: Callable[[str], str]) -> threading.Event:
    """Start a watchdog that ends this process if no exchange succeeds for TIMEOUT_SECONDS.

    Args:
        give_up: saves what can be saved, and turns the trouble into the message for the user.

    Returns:
        The event that stops the watchdog.
    """
    global _last_exchange
    over = threading.Event()
    _last_exchange = time.monotonic()

    def wait() -> None:
        while not over.wait(1.0):
            if time.monotonic() - _last_exchange < TIMEOUT_SECONDS:
                continue
            faulthandler.dump_traceback_later(
                CONNECT_SECONDS, exit=True
            )  # in case saving hangs too
            trouble = (
                f"no exchange between the ranks for {TIMEOUT_SECONDS} seconds; one of them hangs"
            )
            cli.tell(f"error: {give_up(trouble)}")
            os._exit(1)

    if size() > 1:
        threading.Thread(target=wait, daemon=True).start()
    return over
