"""The one training loop and the one evaluation loop."""
import logging
import math
import signal
import time
from array import array

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
from util.metrics import medians, pose_err
from util.plots import plot_loss
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
        The weights with the smallest median position error so far are kept in <prefix>_best.pth.

    Adam and a step schedule by the config. Every n_freq_checkpoint epochs the weights go to <prefix>_checkpoint-<epoch>.pth
    and at the end to <prefix>_final.pth, the picture of the loss to <prefix>_loss_fig.png. The final weights are the mean
    over the steps of the last `average_last` of the training, and batch norm's statistics are taken anew for them, over one
    more epoch (Izmailov et al., UAI 2018, algorithm 1), in the precision of tests; without that key they are those of the
    last step, as published.

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
    tracked = [int(module.num_batches_tracked) for module in norms]
    first_epoch, averaged, n_averaged = 0, [], 0
    best = []  # in validation: the median position error and its epoch
    samples, losses = array("d"), array("d")  # of every step: the samples up to it, and its loss
    if run.resumed:
        first_epoch, averaged, n_averaged, best, tracked, samples, losses = _restore(
            run, model, pose_loss, optimizer, scaler, len(norms), about.get("scene_names"))
    n_steps = len(losses) + max(n_epochs - first_epoch, 0) * len(batches(first_epoch))
    begin_average = n_steps * (1 - config.get("average_last", 0))
    if n_averaged != len(losses) - math.floor(begin_average):  # none yet, or of another part of the training
        averaged, n_averaged = [], 0
    trained_step = step
    if processes.count() > 1:
        trained_step = DistributedDataParallel(_Step(step, model, pose_loss), find_unused_parameters=True)
    saved, saving = -math.inf, 0.0  # when a state was written, and how long that took

    with signals.deferred() as received:
        with progress(total=n_steps, initial=len(losses), unit="batch") as bar:
            for epoch in range(first_epoch, n_epochs):
                model.train()
                if not first:  # else all processes would drop the same
                    torch.manual_seed(mix(run.seed, epoch, processes.rank()))
                for group in optimizer.param_groups:
                    group["lr"] = config["lr"] * config["lr_scheduler_gamma"] ** (epoch // config["lr_scheduler_step_size"])
                running_loss, n_epoch_samples = 0.0, 0
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

                    running_loss, n_epoch_samples = running_loss + batch_loss * size, n_epoch_samples + size
                    samples.append((samples[-1] if samples else 0) + size)
                    losses.append(batch_loss)
                    bar.update()
                    if len(losses) > begin_average:
                        weights = [p.detach() for p in model.parameters()]
                        averaged, n_averaged = averaged or [p.clone() for p in weights], n_averaged + 1
                        torch._foreach_lerp_(averaged, weights, 1 / n_averaged)
                    if i % n_freq_print == 0:
                        errors = (e.mean().item() for e in pose_err(estimate.detach(), batch["pose"]))
                        logging.info("[Batch-{}/Epoch-{}] running camera pose loss: {:.3f}, camera pose error: {:.2f}[m], "
                                     "{:.2f}[deg]".format(i + 1, epoch + 1, running_loss / n_epoch_samples, *errors))
                if validate and (epoch + 1) % config.get("n_freq_validate", 1) == 0:
                    position, text = _validate(model, validate, precision)
                    is_best = not best or position < best[0]
                    logging.info("Validation after epoch %d: median pose error: %s%s", epoch + 1, text,
                                 ", the best so far" if is_best else "")
                    if is_best:
                        best = [position, epoch + 1]
                        if first:
                            before_save()
                            save_weights(f"{run.prefix}_best.pth", model.state_dict(), {**about, "epoch": epoch + 1})
                checkpoint_due = first and (epoch + 1) % n_freq_checkpoint == 0
                state_due = first and (epoch + 1 == n_epochs or time.monotonic() - saved > 20 * saving)
                if checkpoint_due or state_due:
                    _check_finite(run, parameters, epoch)
                if checkpoint_due:
                    before_save()
                    save_weights(f"{run.prefix}_checkpoint-{epoch + 1}.pth", model.state_dict(), about)
                if state_due:
                    begin = time.monotonic()
                    resume.write(run.prefix, {
                        "epoch": epoch + 1, "weights": model.state_dict(), "loss": pose_loss.state_dict(),
                        "optimizer": optimizer.state_dict()["state"], "scaler": scaler.state_dict(), "averaged": averaged,
                        "n_averaged": n_averaged, "best": best, "tracked": tracked, "random": _random_state(run.device),
                        "history": torch.from_numpy(np.array([samples, losses])), "scene_names": about.get("scene_names"),
                        "settings": run.settings})
                    saved = time.monotonic()
                    saving = saved - begin

        model.precision = precision  # as in tests
        if averaged:
            trained = [norm for norm, n_batches in zip(norms, tracked) if norm.num_batches_tracked > n_batches]  # not frozen ones
            _take(averaged, model, trained, batches(n_epochs), lambda batch: step(to_device(batch, run.device)), received)

        if validate:
            logging.info("Validation of the final weights: median pose error: %s", _validate(model, validate, precision)[1])
            if best:
                logging.info("Best in validation: those after epoch %d, %s_best.pth", best[1], run.prefix)
        processes.first_alone()
        before_save()
        logging.info("Training completed")
        save_weights(f"{run.prefix}_final.pth", model.state_dict(), about)
        plot_loss(f"{run.prefix}_loss_fig.png", samples, losses)
        resume.remove(run.prefix)
        logging.info("Weights: %s_final.pth", run.prefix)


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
    """The median position error of a model in its state of testing, and both medians as text."""
    training_precision, model.precision = model.precision, precision
    model.eval()
    estimate, truth = (poses.cpu() for poses in validate())
    model.train()
    model.precision = training_precision
    return float(np.median(pose_err(estimate, truth)[0].numpy())), medians(estimate, truth)


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


def _restore(run, model, pose_loss, optimizer, scaler, n_norms, scene_names):
    """Put modules, optimiser and random numbers into the state of run.resumed. Returns the epochs it has had, the averaged
    weights and the number of steps averaged, the best in validation, batch norm's counters before the first step, and the
    samples and losses of every step."""
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
        samples, losses = (array("d", numbers) for numbers in state["history"].tolist())
        averaged = [mean.to(run.device) for mean in state["averaged"]]
        if averaged and [mean.shape for mean in averaged] != [parameter.shape for parameter in model.parameters()]:
            raise ValueError("other weights were averaged")
        best = [float(state["best"][0]), int(state["best"][1])] if state["best"] else []
        if [type(n) for n in state["tracked"]] != [int] * n_norms:
            raise ValueError("other batch norms")
        for parameter, moments in optimizer.state.items():
            if set(moments) != {"step", "exp_avg", "exp_avg_sq"} or any(
                    moments[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("another optimiser")
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"--resume {run.args.resume}: the state does not fit this training: {str(error)[:200]}") from error
    run.resumed = None  # it is as large as the training itself
    return state["epoch"], averaged, state["n_averaged"], best, state["tracked"], samples, losses


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
    results, singles = [], []
    with progress(total=len(processes.share(range(len(dataset)))), unit="frame") as bar:
        for batch in batches:
            batch = to_device(batch, run.device)
            singles += [{key: value[i:i + 1] for key, value in batch.items()}
                        for i in range(min(N_TIMED - len(singles), len(batch["img"])))]
            taken, result = milliseconds(lambda: estimate(batch), run.device)
            size = len(batch["img"])
            result["milliseconds"] = torch.full((size,), taken / size)
            results.append({key: value.cpu() for key, value in result.items()})
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
    """A batch on a device, its images as the networks take them."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
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
