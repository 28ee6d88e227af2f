"""The one training loop and the one evaluation loop."""
import logging
import time

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from datasets.camera_poses import test_batches, to_input
from models.checkpoints import save_weights
from models.precision import resolve
from util.metrics import pose_err
from util.plots import plot_loss

TEST_BATCH_SIZE = 32
N_TIMED, N_WARM_UP = 20, 3  # single frames whose time a test takes, and calls before


def train(run, model, pose_loss, batches, step, about, before_save=lambda: None):
    """Train a model and write its weights.

    run: of cli.start.
    model: the module whose weights are trained and saved; pose_loss: a module whose parameters are trained with it.
    batches: epoch number -> iterable, with a length, of batches (dicts of tensors).
    step: batch on the device -> (loss, estimated poses N x 7); batch['pose'] is the truth.
    about: what the JSON beside the weights says.
    before_save: called before weights are saved, for what the model keeps beside its parameters.

    The loop waits for the device only where it logs. Adam and a step schedule by the config. Every n_freq_checkpoint epochs
    the weights go to <prefix>_checkpoint-<epoch>.pth and at the end to <prefix>_final.pth, the picture of the loss to
    <prefix>_loss_fig.png. The final weights are the mean over the steps of the last `average_last` of the training, and
    batch norm's statistics are taken anew for them, over one more epoch (Izmailov et al., UAI 2018, algorithm 1), in the
    precision of tests; without that key they are those of the last step, as published.
    """
    config = run.config
    parameters = [p for module in (model, pose_loss) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config["lr"], eps=config["eps"], weight_decay=config["weight_decay"], fused=True)
    precision = config.get("precision", "fp32")
    model.precision = resolve(precision, run.device)
    scaler = torch.amp.GradScaler(run.device.type, enabled=model.precision == "fp16")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config["lr_scheduler_step_size"], config["lr_scheduler_gamma"])
    n_epochs, n_freq_print, n_freq_checkpoint = (config[key] for key in ("n_epochs", "n_freq_print", "n_freq_checkpoint"))

    n_steps = n_epochs * len(batches(0))
    samples, losses = [], torch.empty(n_steps, device=run.device)
    n_samples = 0
    averaged, n_averaged = None, 0
    norms = {module: int(module.num_batches_tracked) for module in model.modules() if isinstance(module, _BatchNorm)}
    with logging_redirect_tqdm(), tqdm(total=n_steps, unit="batch", disable=None) as progress:
        for epoch in range(n_epochs):
            model.train()
            running_loss, n_epoch_samples = 0.0, 0
            for i, batch in enumerate(batches(epoch)):
                batch = to_device(batch, run.device)
                loss, estimate = step(batch)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                loss, size = loss.detach(), len(batch["pose"])
                running_loss, n_epoch_samples, n_samples = running_loss + loss * size, n_epoch_samples + size, n_samples + size
                losses[len(samples)] = loss
                samples.append(n_samples)
                progress.update()
                if len(samples) > n_steps * (1 - config.get("average_last", 0)):
                    weights = [p.detach() for p in model.parameters()]
                    averaged, n_averaged = averaged or [p.clone() for p in weights], n_averaged + 1
                    torch._foreach_lerp_(averaged, weights, 1 / n_averaged)
                if i % n_freq_print == 0:
                    errors = (e.mean().item() for e in pose_err(estimate.detach(), batch["pose"]))
                    logging.info("[Batch-{}/Epoch-{}] running camera pose loss: {:.3f}, camera pose error: {:.2f}[m], "
                                 "{:.2f}[deg]".format(i + 1, epoch + 1, float(running_loss) / n_epoch_samples, *errors))
            scheduler.step()
            if (epoch + 1) % n_freq_checkpoint == 0:
                before_save()
                save_weights(f"{run.prefix}_checkpoint-{epoch + 1}.pth", model.state_dict(), about)

    model.precision = precision  # as in tests
    if averaged:
        for parameter, mean in zip(model.parameters(), averaged):
            parameter.data.copy_(mean)
        trained = [module for module, n_batches in norms.items() if module.num_batches_tracked > n_batches]  # not frozen ones
        for module in trained:
            module.reset_running_stats()
            module.momentum = None  # a mean over all batches
        if trained:
            with torch.no_grad():
                for batch in tqdm(batches(n_epochs), desc="batch norm", unit="batch", disable=None):
                    step(to_device(batch, run.device))

    before_save()
    logging.info("Training completed")
    save_weights(f"{run.prefix}_final.pth", model.state_dict(), about)
    plot_loss(f"{run.prefix}_loss_fig.png", samples, losses.tolist())
    logging.info("Weights: %s_final.pth", run.prefix)


@torch.inference_mode()
def evaluate(run, estimate, dataset):
    """Run a function over a dataset in batches of `test_batch_size`.

    run: of cli.start. estimate: batch on the device -> dict of N x ... tensors.

    Returns the dict of all frames' tensors on the CPU, with 'milliseconds', N: each frame's share of what its batch took,
    and 'milliseconds_alone', M: what each of the first M frames took by itself. Decoding is left out of both.
    """
    if run.args.cache_dir:
        dataset.cache_frames(run.args.cache_dir)
    batches = test_batches(dataset, run.config.get("test_batch_size", TEST_BATCH_SIZE), run.config["n_workers"])
    results, singles = [], []
    with tqdm(total=len(dataset), unit="frame", disable=None) as progress:
        for batch in batches:
            batch = to_device(batch, run.device)
            singles += [{key: value[i:i + 1] for key, value in batch.items()}
                        for i in range(min(N_TIMED - len(singles), len(batch["pose"])))]
            taken, result = milliseconds(lambda: estimate(batch), run.device)
            size = len(batch["pose"])
            result["milliseconds"] = torch.full((size,), taken / size)
            results.append({key: value.cpu() for key, value in result.items()})
            progress.update(size)
    # Single frames last, when no worker decodes any more; the first calls build and warm up, their time says nothing.
    alone = [milliseconds(lambda: estimate(frame), run.device)[0] for frame in [singles[0]] * N_WARM_UP + singles]
    results = {key: torch.cat([result[key] for result in results]) for key in results[0]}
    return {**results, "milliseconds_alone": torch.tensor(alone[N_WARM_UP:])}


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
