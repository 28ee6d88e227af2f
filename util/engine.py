"""The one training loop and the one evaluation loop."""
import logging
import math
import signal
import threading
import time
from array import array
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from datasets.camera_poses import mix, test_batches, to_input
from models.checkpoints import save_weights
from models.precision import resolve
from util import processes, resume, signals
from util.errors import UserError
from util.metrics import median_errors, medians, pose_err
from util.plots import CURVES, draw_training
from util.progress import progress

TEST_BATCH_SIZE = 32
N_TIMED, N_WARM_UP = 20, 3  # single frames whose time a test takes, and calls before


def train(run, model, pose_loss, batches, step, about, before_save=lambda: None, validate=None):
    """Train a model and write its weights.

    run: of cli.start.
    model: the module whose weights are trained and saved; pose_loss: a module whose parameters are trained with it.
    batches: epoch number -> iterable, with a length, of batches (dicts of tensors); of several processes each has its share
        of every batch.
    step: batch on the device -> (loss, a mean over the batch; estimated poses N x 7); batch['pose'] is the truth, batch['row']
        the label file's row.
    about: what the JSON beside the weights says.
    before_save: called before weights are saved, for what the model keeps beside its parameters.
    validate: () -> (estimated, true poses), two of M x 7, of the model as it is: called every `n_freq_validate` epochs and logged.
        The weights with the smallest median position error so far, or in the end the final ones, are kept in <prefix>_best.pth.

    Adam and a step schedule by the config. Every n_freq_checkpoint epochs the weights go to <prefix>_checkpoint-<epoch>.pth
    and at the end to <prefix>_final.pth, the picture of the loss and the errors to <prefix>_loss_fig.png; with --tensorboard both go to
    <prefix>_tensorboard after every epoch. The final weights are the mean over the steps of the last `average_last` of the training,
    and batch norm's statistics are taken anew for them, over one more epoch (Izmailov et al., UAI 2018, algorithm 1), in the
    precision of tests; without that key they are those of the last step, as published.

    The state of the training is written after every epoch, or after so many that this takes at most a twentieth of the time;
    with --resume it goes on from there, and ends with the weights that it would have had. Several processes train one
    model, on the gradients of the whole batch, and the first one writes. Raises UserError, before the weights change, for a
    loss that is not finite.
    """
    config, first = run.config, processes.rank() == 0
    parameters = [p for module in (model, pose_loss) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config["lr"], eps=config["eps"], weight_decay=config["weight_decay"], fused=True)
    precision = config.get("precision", "fp32")
    model.precision = resolve(precision, run.device)
    scaler = torch.amp.GradScaler(run.device.type, enabled=model.precision == "fp16")
    n_epochs, n_freq_print, n_freq_checkpoint = (config[key] for key in ("n_epochs", "n_freq_print", "n_freq_checkpoint"))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    course = _Course(tracked=[int(module.num_batches_tracked) for module in norms])
    if run.resumed:
        course = _restore(run, model, pose_loss, optimizer, scaler, len(norms), about.get("scene_names"))
    losses = course.losses
    n_steps = len(losses) + max(n_epochs - course.epoch, 0) * len(batches(course.epoch))
    begin_average = n_steps * (1 - config.get("average_last", 0))
    if course.begin_average != begin_average:  # what was averaged is another part of the training
        course.averaged, course.n_averaged, course.begin_average = [], 0, begin_average
    trained_step = step
    if processes.count() > 1:
        trained_step = DistributedDataParallel(_Step(step, model, pose_loss), find_unused_parameters=True)
    saved, saving = -math.inf, 0.0  # when a state was written, and how long that took

    with signals.deferred() as received, _tensorboard(run, course) as board:
        with progress(total=n_steps, initial=len(losses), unit="batch") as bar:
            for epoch in range(course.epoch, n_epochs):
                model.train()
                if not first:  # else all processes would drop the same
                    torch.manual_seed(mix(run.seed, epoch, processes.rank()))
                lr = config["lr"] * config["lr_scheduler_gamma"] ** (epoch // config["lr_scheduler_step_size"])
                for group in optimizer.param_groups:
                    group["lr"] = lr
                running_loss, n_samples, seen, first_loss = 0.0, 0, [], len(losses)
                for i, batch in enumerate(batches(epoch)):
                    batch = to_device(batch, run.device)
                    loss, estimate = trained_step(batch)
                    of_all, sums = _start_sums(loss, len(batch["pose"]), bool(received))
                    optimizer.zero_grad()
                    scaler.scale(loss if of_all is None else loss * of_all).backward()
                    batch_loss, size, stop = sums()
                    if stop:
                        raise signals.Stopped(received[0] if received else signal.SIGTERM)
                    if not math.isfinite(batch_loss):
                        _stop_at(run, f"batch {i + 1} of epoch {epoch + 1}: the loss is {batch_loss}", batch, estimate)
                    scaler.step(optimizer)
                    scaler.update()

                    running_loss, n_samples = running_loss + batch_loss * size, n_samples + size
                    losses.append(batch_loss)
                    seen.append((estimate.detach(), batch["pose"]))
                    if len(losses) > begin_average:
                        weights = [p.detach() for p in model.parameters()]
                        course.averaged, course.n_averaged = course.averaged or [p.clone() for p in weights], course.n_averaged + 1
                        torch._foreach_lerp_(course.averaged, weights, 1 / course.n_averaged)
                    if i % n_freq_print == 0:
                        errors = tuple(e.mean().item() for e in pose_err(estimate.detach(), batch["pose"]))
                        logging.info("[Batch-{}/Epoch-{}] running camera pose loss: {:.3f}, camera pose error: {:.2f}[m], "
                                     "{:.2f}[deg]".format(i + 1, epoch + 1, running_loss / n_samples, *errors))
                        bar.set_postfix_str("epoch {}, loss {:.3f}, {:.2f} m, {:.2f} deg".format(epoch + 1, running_loss / n_samples, *errors))
                    bar.update()
                course.epoch = epoch + 1
                shares = processes.gather([torch.cat(poses).cpu() for poses in zip(*seen)])
                errors, of_validation = median_errors(*map(torch.cat, zip(*shares))), (math.nan, math.nan)
                if validate and course.epoch % config.get("n_freq_validate", 1) == 0:
                    of_validation, text = _validate(model, validate, precision)
                    is_best = not course.best or of_validation[0] < course.best[0]
                    logging.info("Validation after epoch %d: median pose error: %s%s", course.epoch, text,
                                 ", the best so far" if is_best else "")
                    if is_best:
                        course.best = [of_validation[0], course.epoch]
                        if first:
                            before_save()
                            save_weights(f"{run.prefix}_best.pth", model.state_dict(), {**about, "epoch": course.epoch})
                course.curves.append([len(losses), lr, running_loss / n_samples, *errors, *of_validation])
                board(course.curves[-1], losses[first_loss:])
                checkpoint_due = first and course.epoch % n_freq_checkpoint == 0
                state_due = first and (course.epoch == n_epochs or time.monotonic() - saved > 20 * saving)
                if checkpoint_due or state_due:
                    _check_finite(run, parameters, epoch)
                if checkpoint_due:
                    before_save()
                    save_weights(f"{run.prefix}_checkpoint-{course.epoch}.pth", model.state_dict(), about)
                if state_due:
                    begin = time.monotonic()
                    _write_state(run, course, model, pose_loss, optimizer, scaler, about.get("scene_names"))
                    saved = time.monotonic()
                    saving = saved - begin

        model.precision = precision  # as in tests
        if course.averaged:
            trained = [norm for norm, n in zip(norms, course.tracked) if norm.num_batches_tracked > n]  # not frozen ones
            _take(course.averaged, model, trained, batches(n_epochs), lambda batch: step(to_device(batch, run.device)), received)

        final = None
        if validate:
            final, text = _validate(model, validate, precision)
            logging.info("Validation of the final weights: median pose error: %s", text)
        processes.first_alone()
        before_save()
        if validate:
            final_is_best = not course.best or final[0] < course.best[0]
            if final_is_best:
                save_weights(f"{run.prefix}_best.pth", model.state_dict(), {**about, "epoch": "final"})
            logging.info("Best in validation: %s, %s_best.pth", "the final weights" if final_is_best else
                         f"those after epoch {course.best[1]}", run.prefix)
        logging.info("Training completed")
        save_weights(f"{run.prefix}_final.pth", model.state_dict(), about)
        draw_training(f"{run.prefix}_loss_fig.png", losses, course.curves, final)
        resume.remove(run.prefix)
        logging.info("Picture: %s_loss_fig.png", run.prefix)
        logging.info("Weights: %s_final.pth", run.prefix)


@dataclass
class _Course:
    """What a training has come to, besides the state of its modules."""
    tracked: list  # batch norms' counters before the first step
    epoch: int = 0
    losses: array = field(default_factory=lambda: array("d"))  # of every step
    curves: list = field(default_factory=list)  # of every epoch, see plots.CURVES
    best: list = field(default_factory=list)  # in validation: the median position error and its epoch
    begin_average: float = 0  # the steps before those whose weights are averaged
    averaged: list = field(default_factory=list)
    n_averaged: int = 0


@contextmanager
def _tensorboard(run, course):
    """A function that writes an epoch to TensorBoard, over steps, where --tensorboard asks for it: (CURVES, losses of its steps). The epochs
    of the course so far are written anew, and what an earlier process wrote does not count."""
    if not run.args.tensorboard or processes.rank() > 0:
        yield lambda curves, losses: None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = f"{run.prefix}_tensorboard"

    def write(curves, losses):
        n_steps, *values = curves
        try:
            for i, loss in enumerate(losses, n_steps - len(losses) + 1):
                writer.add_scalar("loss/batch", loss, i)
            for name, value in zip(CURVES[1:], values):
                if math.isfinite(value):
                    writer.add_scalar(name, value, n_steps)
            writer.flush()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error

    hook = threading.excepthook  # the writer's thread would print a traceback of what flush raises again
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else hook(failed)
    try:
        writer = SummaryWriter(folder, purge_step=0)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    logging.info("TensorBoard: %s", folder)
    try:
        for curves, (begin, *_) in zip(course.curves, [[0], *course.curves]):
            write(curves, course.losses[begin:curves[0]])
        yield write
    finally:
        with suppress(OSError):
            writer.close()
        threading.excepthook = hook


class _Step(nn.Module):
    """A step as a module of all that it trains, which is what DistributedDataParallel takes."""

    def __init__(self, step, *modules):
        super().__init__()
        self.step, self.modules_trained = step, nn.ModuleList(modules)

    def forward(self, batch):
        return self.step(batch)


def _start_sums(loss, size, stop):
    """Begin to sum over the processes. loss: the mean over this one's frames, so many; stop: whether it was asked to end.

    Returns by what to multiply the loss, so that the mean of the processes' gradients is that over all frames (None in one
    process), and a function that waits for the sums: () -> (loss over all frames, frames, whether any process was asked to
    end). Meanwhile a GPU can be given the backward pass.
    """
    several = processes.count() > 1
    sums, of_all = loss.detach(), None
    if several:
        # Filled, not copied there: a GPU would be waited for.
        n_frames, n_stop = (torch.full((), number, dtype=torch.double, device=loss.device) for number in (size, stop))
        sums = torch.stack((sums.double() * size, n_frames, n_stop))
        torch.distributed.all_reduce(sums)
        of_all = size * processes.count() / sums[1]
    here = sums.to("cpu", non_blocking=True)
    ready = torch.cuda.Event() if loss.is_cuda else None
    if ready:
        ready.record()

    def wait():
        if ready:
            ready.synchronize()
        if not several:
            return here.item(), size, stop
        total, n_frames, n_stop = here.tolist()
        return total / n_frames, int(n_frames), n_stop > 0

    return of_all, wait


@torch.no_grad()
def _take(averaged, model, norms, batches, step, received):
    """Give a model its averaged weights, and its batch norms the statistics of batches under them, over all processes."""
    for parameter, mean in zip(model.parameters(), averaged):
        parameter.copy_(mean)
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
    model.train()
    for batch in progress(batches, desc="batch norm", unit="batch"):
        step(batch)
        if received:
            raise signals.Stopped(received[0])
    if processes.count() > 1:
        for statistic in (statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)):
            torch.distributed.all_reduce(statistic)
            statistic /= processes.count()


@torch.no_grad()
def _validate(model, validate, precision):
    """The median errors of a model in its state of testing, and as text."""
    training_precision, model.precision = model.precision, precision
    model.eval()
    estimate, truth = (poses.cpu() for poses in validate())
    model.train()
    model.precision = training_precision
    return median_errors(estimate, truth), medians(estimate, truth)


def _stop_at(run, problem, batch, estimate):
    """Raise UserError for numbers that are not finite: which, in what frames, and what to try."""
    rows = batch["row"].tolist()
    finite = torch.isfinite((estimate.detach() - batch["pose"]).square().sum(dim=1)).tolist()
    shares = processes.gather((rows, [row for row, good in zip(rows, finite) if not good]))
    rows, bad = (sorted({row for share in part for row in share}) for part in zip(*shares))
    listed = ", ".join(map(str, bad or rows))
    raise UserError(f"{problem}; frames: rows {listed} of {run.args.labels_file}; {resume.advice(run)}; try a smaller lr, or "
                    "precision=fp32, with --set, and look at these frames (python -m datasets.labels check)")


def _check_finite(run, parameters, epoch):
    """Raise UserError where gradients have made weights that are not finite, though every loss was."""
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise UserError(f"epoch {epoch + 1}: the weights after it are not finite; {resume.advice(run)}; try a smaller lr, or "
                        "precision=fp32, with --set")


def _random_state(device):
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})}


def _write_state(run, course, model, pose_loss, optimizer, scaler, scene_names):
    """Write the state of a training, of which `_restore` makes it anew."""
    resume.write(run.prefix, {
        "weights": model.state_dict(), "loss": pose_loss.state_dict(), "optimizer": optimizer.state_dict()["state"],
        "scaler": scaler.state_dict(), "random": _random_state(run.device), **vars(course), "losses": torch.from_numpy(np.array(course.losses)),
        "scene_names": scene_names, "settings": run.settings})


def _restore(run, model, pose_loss, optimizer, scaler, n_norms, scene_names):
    """Put modules, optimiser and random numbers into the state of run.resumed. Returns the training's course so far."""
    state = run.resumed
    if state["scene_names"] != scene_names:
        raise UserError(f"--resume {run.args.resume}: the model's scenes were {state['scene_names']} and are {scene_names} now; "
                        "give them in their order with --set scene_names=... or as they were given")
    try:
        model.load_state_dict(state["weights"])
        pose_loss.load_state_dict(state["loss"])
        # The learning rate and its like are the config's.
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
        if state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        if run.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], run.device)
        course = _Course(**{part.name: state[part.name] for part in fields(_Course)})
        course.losses = array("d", course.losses.tolist())
        course.curves = [[int(n), *map(float, values)] for n, *values in course.curves]
        if any(len(values) != len(CURVES) for values in course.curves):
            raise ValueError("other curves")
        course.averaged = [mean.to(run.device) for mean in course.averaged]
        if course.averaged and [mean.shape for mean in course.averaged] != [parameter.shape for parameter in model.parameters()]:
            raise ValueError("other weights were averaged")
        course.best = [float(course.best[0]), int(course.best[1])] if course.best else []
        if [type(n) for n in course.tracked] != [int] * n_norms:
            raise ValueError("other batch norms")
        for parameter, moments in optimizer.state.items():
            if set(moments) != {"step", "exp_avg", "exp_avg_sq"} or any(
                    moments[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("another optimiser")
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"--resume {run.args.resume}: the state does not fit this training: {str(error)[:200]}") from error
    run.resumed = None  # it is as large as the training itself
    return course


@torch.inference_mode()
def evaluate(run, estimate, dataset):
    """Run a function over a dataset in batches of `test_batch_size`.

    run: of cli.start. estimate: batch on the device -> dict of N x ... tensors.

    Returns the dict of all frames' tensors on the CPU, with 'milliseconds', N: each frame's share of what its batch took,
    and 'milliseconds_alone', M: what each of the first M frames took by itself. Decoding is left out of both. Several
    processes share the frames; the first one returns, the others end.
    """
    if run.args.cache_dir:
        dataset.cache_frames(run.args.cache_dir)
    batches = frames_of(run, dataset)
    results, singles, errors = [], [], []
    with dataset.naming_all_unreadable(), progress(total=len(processes.share(range(len(dataset)))), unit="frame") as bar:
        for batch in batches:
            batch = to_device(batch, run.device)
            singles += [{key: value[i:i + 1] for key, value in batch.items()}
                        for i in range(min(N_TIMED - len(singles), len(batch["img"])))]
            taken, result = milliseconds(lambda: estimate(batch), run.device)
            size = len(batch["img"])
            result["milliseconds"] = torch.full((size,), taken / size)
            results.append({key: value.cpu() for key, value in result.items()})
            if not bar.disable and "pose" in batch:
                errors.append(torch.stack(pose_err(results[-1]["pose"], batch["pose"].cpu())))
                bar.set_postfix_str("median {:.2f} m, {:.2f} deg".format(*torch.cat(errors, dim=1).quantile(0.5, dim=1)))
            bar.update(size)
    results = processes.merge(concatenate(results))
    processes.first_alone()
    # Single frames last, when no worker decodes any more; the first calls build and warm up, their time says nothing.
    alone = [milliseconds(lambda: estimate(frame), run.device)[0] for frame in [singles[0]] * N_WARM_UP + singles]
    return {**results, "milliseconds_alone": torch.tensor(alone[N_WARM_UP:])}


def frames_of(run, dataset, epoch=0):
    """A loader of this process's share of a dataset, as tests take it: `test_batches` by the config."""
    return test_batches(dataset, run.config.get("test_batch_size", TEST_BATCH_SIZE), run.config["n_workers"], epoch)


def answers(run, batches, answer, desc):
    """What a function answers to batches of `frames_of`: batch on the device -> dict of N x ... tensors. Returns
    the dict of all frames' tensors, those of other processes too, in order."""
    results = [answer(to_device(batch, run.device)) for batch in progress(batches, desc=desc, unit="batch")]
    return processes.merge(concatenate(results))


def concatenate(results):
    """Dicts of N_i x ... tensors -> one of their rows one after the other; {} for none."""
    return {key: torch.cat([result[key] for result in results]) for key in (results[0] if results else ())}


def to_device(batch, device):
    """A batch on a device, its images as the networks take them. Nothing of it is a worker's shared memory, which is an open
    file for as long as it is kept."""
    batch = {key: value.to(device, non_blocking=True, copy=value.is_shared()) for key, value in batch.items()}
    return {**batch, "img": to_input(batch["img"])} if "img" in batch else batch


def milliseconds(function, device):
    """How long a function takes on a device, and what it returns."""
    synchronize(device)
    begin = time.perf_counter()
    result = function()
    synchronize(device)
    return 1000 * (time.perf_counter() - begin), result


def synchronize(device):
    """Wait until a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
