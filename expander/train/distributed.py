"""One training run on several Macs: `mlx.launch -n 2 --backend ring -- python train.py sft`.

Every rank takes its share of each step's rows or prompts, and what it finds is exchanged: all know the
same, so all decide alike and hold the same weights. Rank 0 alone prints and writes, and what it has
is what a run starts from, so the other Macs need no checkpoint. With one process each function here
gives back what it was given.

The ring may hang (mlx #4475), and a Mac may vanish without closing its connections: hence `watch`.
"""

import faulthandler
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

CONNECT_SECONDS = 60
# No rank may be this far behind the others, between two of their meetings.
TIMEOUT_SECONDS = 300
LOSS = "the connection to another rank was lost"

_last_meeting = 0.0


def rank() -> int:
    return mx.distributed.init().rank()


def size() -> int:
    return mx.distributed.init().size()


@contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of the ranks that mlx.launch started, or the only one.

    Raises:
        ConnectionError: another rank is not there, or was lost before the training began.
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
    # While MLX waits for another rank it lets no thread run; this timer needs none.
    faulthandler.dump_traceback_later(2 * CONNECT_SECONDS, exit=True)
    try:
        while True:
            try:
                mx.distributed.init(strict=True)
                return
            except RuntimeError as error:
                # MLX itself gives up on a rank that is 15 seconds late.
                if "Couldn't connect" not in str(error) or time.monotonic() > deadline:
                    raise ConnectionError(f"cannot connect to the other ranks: {error}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_loss(error: BaseException | None) -> bool:
    """Whether MLX found in a collective that another rank's process has ended."""
    return isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)


def _meet(array: np.ndarray) -> np.ndarray:
    """`array` (N, ...) of every rank as (ranks x N, ...)."""
    global _last_meeting
    gathered = mx.distributed.all_gather(mx.array(array), stream=mx.cpu)
    mx.eval(gathered)
    _last_meeting = time.monotonic()
    return np.array(gathered)


def gather(value) -> list:
    """The value of each rank, anything that JSON can hold, by rank."""
    if size() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = _meet(np.array([data.size]))
    padded = np.zeros((1, lengths.max()), np.uint8)
    padded[0, : data.size] = data
    return [json.loads(bytes(row[:n])) for row, n in zip(_meet(padded), lengths, strict=True)]


def barrier() -> None:
    """Go on when every rank is here."""
    gather(None)


def share_out(items: Sequence) -> Sequence:
    """This rank's part of `items`, next to each other and as many as the others' but for one.

    The parts of all ranks, one after the other, are the whole: `collect` puts them together.
    """
    first, last = (len(items) * n // size() for n in (rank(), rank() + 1))
    return items[first:last]


def collect(part: list) -> list:
    """Every rank's list, one after the other."""
    return [item for items in gather(part) for item in items]


def all_sum(tree):
    """The sum over the ranks of a tree of float32 arrays, evaluated."""
    if size() == 1:
        return tree
    # Apart from any work on the GPU: Metal ends a command that waits 5 seconds for another rank.
    mx.eval(tree)
    with mx.stream(mx.cpu):
        summed = tree_map(lambda mean: mean * size(), average_gradients(tree))
        mx.eval(summed)
    return summed


def broadcast(tree):
    """Rank 0's arrays in place of this rank's, which have the same names and shapes."""
    received = {}
    with mx.stream(mx.cpu):
        # By name and one at a time: a tree that was loaded has another order than a fresh one, and
        # ranks that send different arrays to each other wait for ever.
        for name, array in sorted(tree_flatten(tree), key=lambda item: item[0]):
            received[name] = mx.distributed.all_sum(array if rank() == 0 else mx.zeros_like(array))
            mx.eval(received[name])
    return tree_map_with_path(lambda name, _: received[name], tree)


def check_same(**values) -> None:
    """Fail on every rank if these are not the same on all of them.

    Raises:
        ValueError: names what differs.
    """
    prints = {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in values.items()}
    others = gather(prints)
    differing = [name for name in prints if any(other[name] != prints[name] for other in others)]
    if differing:
        raise ValueError(
            f"the ranks do not have the same {' and '.join(differing)}: copy the project's folder, "
            "its data and its outputs from the first Mac to the others"
        )


def watch(give_up: Callable[[str], str]) -> threading.Event:
    """End this process when the ranks have not met for TIMEOUT_SECONDS, until the event is set.

    Args:
        give_up: saves what can be saved; makes of the trouble what the user should read.
    """
    global _last_meeting
    over = threading.Event()
    _last_meeting = time.monotonic()

    def wait() -> None:
        while not over.wait(1.0):
            if time.monotonic() - _last_meeting < TIMEOUT_SECONDS:
                continue
            faulthandler.dump_traceback_later(CONNECT_SECONDS, exit=True)  # if saving hangs as well
            trouble = f"the ranks have not met for {TIMEOUT_SECONDS} seconds, one of them hangs"
            print(f"error: {give_up(trouble)}", file=sys.stderr, flush=True)
            os._exit(1)

    if size() > 1:
        threading.Thread(target=wait, daemon=True).start()
    return over
