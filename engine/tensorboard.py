"""A training's curves for TensorBoard, where --tensorboard asks for them."""
import logging
import math
import threading
from contextlib import contextmanager, suppress

from engine.plots import CURVES
from util import processes
from util.files import writing


@contextmanager
def curve_writer(state):
    """Within the block, a function that writes the last epoch of a training's state to <prefix>_tensorboard.

    Epochs that the state has already are written first, and replace what an earlier process wrote.
    """
    run = state.run
    if not run.tensorboard or processes.rank() > 0:
        yield lambda: None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = f"{run.prefix}_tensorboard"

    def write(curves, losses):
        n_steps, *values = curves
        with writing(folder):
            for i, loss in enumerate(losses, n_steps - len(losses) + 1):
                writer.add_scalar("loss/batch", loss, i)
            for name, value in zip(CURVES[1:], values):
                if math.isfinite(value):
                    writer.add_scalar(name, value, n_steps)
            writer.flush()

    def write_epoch(i=-1):
        begin = state.curves[i - 1][0] if state.curves[:i] else 0
        write(state.curves[i], state.losses[begin:state.curves[i][0]])

    hook = threading.excepthook  # the writer's thread would print a traceback of what flush raises again
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else hook(failed)
    with writing(folder):
        writer = SummaryWriter(folder, purge_step=0)
    logging.info("TensorBoard: %s", folder)
    try:
        for i in range(len(state.curves)):
            write_epoch(i)
        yield write_epoch
    finally:
        with suppress(OSError):
            writer.close()
        threading.excepthook = hook
