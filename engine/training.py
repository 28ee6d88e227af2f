"""Training: the loop over epochs, whatever is trained."""
import logging
import math
import signal
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import resume
from engine.evaluation import to_device
from engine.plots import draw_training
from engine.tensorboard import curve_writer
from engine.training_state import TrainingState
from models.checkpoints import save_weights
from models.precision import resolve
from util import processes, signals
from util.errors import UserError
from util.log import DETAIL
from util.metrics import format_medians, median_errors, pose_err
from util.progress import progress
from util.seeds import mix


def train(run, model, pose_loss, batches, step, about, before_save=lambda: None, validate=None):
    """Train a model and write its weights.

    run: an engine.run.Run.
    model: the module whose weights are trained and saved. pose_loss: a module whose parameters are trained with it.
    batches: epoch number -> iterable, with a length, of batches (dicts of tensors). With several processes each rank
        gets its shard of every batch.
    step: batch on the device -> (loss, a mean over the batch; estimated poses N x 7). batch['pose'] is the true pose,
        batch['row'] the label file's row.
    about: the content of the JSON beside the weights.
    before_save: called before weights are saved, to update what the model keeps beside its parameters.
    validate: () -> (estimated, true poses), M x 7 each, of the model as it is. It runs every `n_freq_validate` epochs
        and on the final weights.

    Adam and a step schedule, as the config says. Every `n_freq_checkpoint` epochs the weights are written to
    <prefix>_checkpoint-<epoch>.pth, and at the end to <prefix>_final.pth, with a picture of the curves beside. With
    validation, <prefix>_best.pth has the weights with the smallest median position error. The final weights are the
    mean over the steps of the last `average_last` of the training (stochastic weight averaging, SWA: Izmailov et al.,
    UAI 2018, algorithm 1), with batch norm's statistics computed anew; without that key they are the last step's, as
    published.

    A resumed training ends with the weights that it would have had uninterrupted. Several processes train one model on
    the gradient of the whole batch, and rank 0 writes. Raises UserError, before the weights change, for a loss that is
    not finite.
    """
    config, n_epochs = run.config, run.config["n_epochs"]
    model.precision = resolve(config["precision"], run.device)
    state = TrainingState(run, model, pose_loss, about.get("scene_names"))
    n_steps = len(state.losses) + max(n_epochs - state.epoch, 0) * len(batches(state.epoch))
    state.average_after(n_steps * (1 - config["average_last"]))
    parallel_step = _parallel(step, model, pose_loss)

    def save(name, **more):
        before_save()
        save_weights(f"{run.prefix}_{name}.pth", model.state_dict(), {**about, **more})

    with signals.deferred() as received, curve_writer(state) as write_curves:
        with progress(total=n_steps, initial=len(state.losses), unit="batch") as bar:
            clock = EpochClock(n_epochs - state.epoch)
            while state.epoch < n_epochs:
                train_one_epoch(state, batches(state.epoch), parallel_step, received, bar)
                if validate and state.epoch % config["n_freq_validate"] == 0:
                    keep_best(state, validation_errors(model, validate, config["precision"]), save)
                write_curves()
                save_if_due(state, save)
                clock.log(state.epoch, n_epochs)

        model.precision = config["precision"]  # as in tests
        if state.average is not None:
            load_average(state, batches(n_epochs), step, received)
        finish(state, validate, save)


class EpochClock:
    """Logs after every epoch how long it took, and what is left."""

    def __init__(self, n_epochs):
        """n_epochs: those to come."""
        self.begin = self.before = time.monotonic()
        self.n_epochs, self.n_done = n_epochs, 0

    def log(self, epoch, last):
        """Log the end of an epoch. epoch: its number from 1; last: the last one's."""
        now = time.monotonic()
        self.n_done += 1
        left = (now - self.begin) / self.n_done * (self.n_epochs - self.n_done)
        logging.info("Epoch %d of %d took %.1f s; %s left", epoch, last, now - self.before,
                     f"{left / 60:.1f} min" if left > 90 else f"{left:.0f} s",
                     extra=DETAIL if now - self.before < 1 else None)
        self.before = now


def train_one_epoch(state, batches, step, received, bar):
    """Train for one epoch, and append its losses and its curves (learning rate, loss and median errors) to the state.

    step: as for `train`, of all ranks. received: the signals that ask for an end, which comes before the next step.
    """
    run, model, config = state.run, state.model, state.run.config
    model.train()
    if processes.rank() > 0:  # else all ranks would drop the same units
        torch.manual_seed(mix(run.seed, state.epoch, processes.rank()))
    lr = config["lr"] * config["lr_scheduler_gamma"] ** (state.epoch // config["lr_scheduler_step_size"])
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    running_loss, n_samples, estimates, truths = 0.0, 0, [], []
    for i, batch in enumerate(batches):
        batch = to_device(batch, run.device)
        loss, estimate = step(batch)
        loss_scale, reduced = _begin_all_reduce(loss, len(batch["pose"]), bool(received))
        state.optimizer.zero_grad()
        state.scaler.scale(loss if loss_scale is None else loss * loss_scale).backward()
        batch_loss, batch_size, stop = reduced()
        if stop:
            raise signals.Stopped(received[0] if received else signal.SIGTERM)
        if not math.isfinite(batch_loss):
            problem = f"batch {i + 1} of epoch {state.epoch + 1}: the loss is {batch_loss}"
            raise_non_finite(run, problem, batch, estimate)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.count_step(batch_loss)

        running_loss, n_samples = running_loss + batch_loss * batch_size, n_samples + batch_size
        estimates.append(estimate.detach())
        truths.append(batch["pose"])
        if i % config["n_freq_print"] == 0:
            mean_loss, errors = running_loss / n_samples, [e.mean().item() for e in pose_err(estimates[-1], truths[-1])]
            logging.info("[Batch-{}/Epoch-{}] running camera pose loss: {:.3f}, camera pose error: {:.2f}[m], "
                         "{:.2f}[deg]".format(i + 1, state.epoch + 1, mean_loss, *errors))
            shown = "epoch {}, loss {:.3f}, {:.2f} m, {:.2f} deg".format(state.epoch + 1, mean_loss, *errors)
            bar.set_postfix_str(shown)
        bar.update()
    of_all_ranks = processes.gather([torch.cat(poses).cpu() for poses in (estimates, truths)])
    errors = median_errors(*map(torch.cat, zip(*of_all_ranks)))
    state.count_epoch(lr, running_loss / n_samples, errors)


def validation_errors(model, validate, precision):
    """The median errors (metres, degrees) of a model in validation, computed as in tests."""
    training_precision, model.precision = model.precision, precision
    model.eval()
    with torch.no_grad():
        estimate, truth = (poses.cpu() for poses in validate())
    model.train()
    model.precision = training_precision
    return median_errors(estimate, truth)


def keep_best(state, errors, save):
    """Log an epoch's validation errors, and save the weights if their median position error is the smallest so far."""
    is_best = not state.best or errors[0] < state.best[0]
    logging.info("Validation after epoch %d: median pose error: %s%s", state.epoch, format_medians(errors),
                 ", the best so far" if is_best else "")
    state.curves[-1][-2:] = errors
    if is_best:
        state.best = [errors[0], state.epoch]
        if processes.rank() == 0:
            save("best", epoch=state.epoch)


def save_if_due(state, save):
    """Write a checkpoint every `n_freq_checkpoint` epochs, and the training's state where that takes little time."""
    if processes.rank() > 0:
        return
    run = state.run
    checkpoint_due = state.epoch % run.config["n_freq_checkpoint"] == 0
    state_due = state.epoch == run.config["n_epochs"] or state.is_due()
    if (checkpoint_due or state_due) and not all(torch.isfinite(parameter).all() for parameter in state.parameters):
        raise UserError(f"epoch {state.epoch}: the weights after it are not finite; {resume.advice(run)}; try a "
                        "smaller lr, or precision=fp32, with --set")
    if checkpoint_due:
        save(f"checkpoint-{state.epoch}")
    if state_due:
        state.write()


@torch.no_grad()
def load_average(state, batches, step, received):
    """Give the model its averaged weights, and its batch norms the statistics of one epoch under them.

    torch.optim.swa_utils.update_bn would also reset the batch norms that a training keeps frozen.
    """
    model = state.model
    for parameter, mean in zip(model.parameters(), state.average.module.parameters()):
        parameter.copy_(mean)
    norms = state.trained_norms()
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
    model.train()
    for batch in progress(batches, desc="batch norm", unit="batch"):
        step(to_device(batch, state.run.device))
        if received:
            raise signals.Stopped(received[0])
    if processes.world_size() > 1:
        for statistic in (statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)):
            torch.distributed.all_reduce(statistic)
            statistic /= processes.world_size()


def finish(state, validate, save):
    """Validate and save the final weights, draw the curves, and remove the training's state."""
    run, final_errors = state.run, None
    if validate:
        final_errors = validation_errors(state.model, validate, run.config["precision"])
        logging.info("Validation of the final weights: median pose error: %s", format_medians(final_errors))
    processes.continue_on_first()
    if validate:
        final_is_best = not state.best or final_errors[0] < state.best[0]
        if final_is_best:
            save("best", epoch="final")
        logging.info("Best in validation: %s, %s_best.pth", "the final weights" if final_is_best else
                     f"those after epoch {state.best[1]}", run.prefix)
    logging.info("Training completed")
    save("final")
    draw_training(f"{run.prefix}_loss_fig.png", state.losses, state.curves, final_errors)
    resume.remove(run.prefix)
    logging.info("Picture: %s_loss_fig.png", run.prefix)
    logging.info("Weights: %s_final.pth", run.prefix)


def raise_non_finite(run, problem, batch, estimate):
    """Raise a UserError for a loss that is not finite: the frames it comes from, and what to try."""
    rows = batch["row"].tolist()
    finite = torch.isfinite((estimate.detach() - batch["pose"]).square().sum(dim=1)).tolist()
    of_all_ranks = processes.gather((rows, [row for row, is_finite in zip(rows, finite) if not is_finite]))
    rows, bad = (sorted({row for rows in part for row in rows}) for part in zip(*of_all_ranks))
    listed = ", ".join(map(str, bad or rows))
    raise UserError(f"{problem}; frames: rows {listed} of {run.labels_file}; {resume.advice(run)}; try a smaller lr, "
                    "or precision=fp32, with --set, and look at these frames (python -m datasets.labels check)")


def _parallel(step, *modules):
    """The step of all ranks: its gradients are averaged over them. With one process it is the step itself."""
    if processes.world_size() == 1:
        return step
    return DistributedDataParallel(_Step(step, modules), find_unused_parameters=True)


class _Step(nn.Module):
    """A step as a module of all that it trains, as DistributedDataParallel needs it."""

    def __init__(self, step, modules):
        super().__init__()
        self.step, self.trained = step, nn.ModuleList(modules)

    def forward(self, batch):
        return self.step(batch)


def _begin_all_reduce(loss, batch_size, stop):
    """Start to sum a step's numbers over all ranks. The backward pass can be queued before the sums are waited for.

    loss: the mean over this rank's frames. stop: whether this rank was asked to end.

    Returns a factor for this rank's loss, by which the mean of all ranks' gradients becomes the mean over all frames
    (None with one process), and a function that waits: () -> (mean loss over all frames, number of frames, whether any
    rank was asked to end).
    """
    several = processes.world_size() > 1
    sums, loss_scale = loss.detach(), None
    if several:
        # Filled on the device: copying a number there would wait for the GPU.
        n_frames, n_stop = (torch.full((), number, dtype=torch.double, device=loss.device)
                            for number in (batch_size, stop))
        sums = torch.stack((sums.double() * batch_size, n_frames, n_stop))
        torch.distributed.all_reduce(sums)
        loss_scale = batch_size * processes.world_size() / sums[1]
    on_cpu = sums.to("cpu", non_blocking=True)
    ready = torch.cuda.Event() if loss.is_cuda else None
    if ready:
        ready.record()

    def reduced():
        if ready:
            ready.synchronize()
        if not several:
            return on_cpu.item(), batch_size, stop
        total, n_frames, n_stop = on_cpu.tolist()
        return total / n_frames, int(n_frames), n_stop > 0

    return loss_scale, reduced
