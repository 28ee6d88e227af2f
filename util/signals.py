"""SIGINT and SIGTERM: an end in order, with exit status 130 or 143."""
import contextlib
import signal

from util import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # a kind of it, which workers that load data end quietly with
    """A signal asks the process to end."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


def _raise(signum, frame):
    raise Stopped(signum)


@contextlib.contextmanager
def raised():
    """Within the block a signal raises Stopped at once."""
    with _handled_by(_raise):
        yield


@contextlib.contextmanager
def deferred():
    """Within the block a signal is noted in the list that this yields, to be asked for where an end leaves nothing half
    done; a second one raises Stopped at once. What fails because of a signal, such as loading from workers that it ended, is
    Stopped too."""
    received = []

    def note(signum, frame):
        received.append(signum)
        if not processes.under_torchrun():  # which passes signals on, so that they may come twice
            signal.signal(signum, _raise)

    with _handled_by(note):
        try:
            yield received
        except RuntimeError as error:
            if received:
                raise Stopped(received[0]) from error
            raise


@contextlib.contextmanager
def _handled_by(handler):
    before = [signal.signal(signum, handler) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, earlier in zip(SIGNALS, before):
            signal.signal(signum, earlier)
