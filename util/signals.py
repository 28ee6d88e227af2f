"""SIGINT and SIGTERM: they end a run in order, with exit status 130 or 143."""
import contextlib
import signal

from util import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # a subclass, because data loading workers end silently on a KeyboardInterrupt
    """A signal asked the process to end."""

    def __init__(self, signum):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


def _raise(signum, frame):
    raise Stopped(signum)


@contextlib.contextmanager
def raised():
    """Within the block, a signal raises Stopped at once."""
    with _handled_by(_raise):
        yield


@contextlib.contextmanager
def deferred():
    """Within the block, a signal is only appended to the list that this yields.

    The block looks there wherever it can end and leave nothing half done. A second signal raises Stopped at once. A
    failure because of a signal, such as of loading from workers that the signal ended, is raised as Stopped too.
    """
    received = []

    def note(signum, frame):
        received.append(signum)
        if not processes.under_torchrun():  # torchrun passes signals on, so one may arrive twice
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
    """Within the block, a function handles the SIGNALS."""
    before = [signal.signal(signum, handler) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, earlier in zip(SIGNALS, before):
            signal.signal(signum, earlier)
