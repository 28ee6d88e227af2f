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
def held():
    """A signal within the block raises Stopped at its end, as it must where a process is forked.

    While Python forks, an exception would leave locks held and the new process unknown. (Masking signals is not enough:
    a library's thread can take them.) The new process ignores them until it calls `handled_by_system`.
    """
    received = []
    with _handled_by(lambda signum, frame: received.append(signum)):
        yield
    if received:
        raise Stopped(received[0])


def handled_by_system():
    """Let SIGTERM end this process, which was forked by another, without a word. SIGINT is for that one alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _handled_by(handler):
    """Within the block, a function handles the SIGNALS."""
    before = [signal.signal(signum, handler) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, earlier in zip(SIGNALS, before):
            signal.signal(signum, earlier)
