"""The one training loop and the one evaluation loop."""
import logging
import time

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models.checkpoints import save_weights
from util.metrics import pose_err
from util.plots import plot_loss


def train(run, model, pose_loss, batches, step, about):
    """Train a model and write its weights.

    run: of cli.start.
    model: the module whose weights are trained and saved; pose_loss: a module whose parameters are trained with it.
    batches: epoch number -> iterable, with a length, of batches (dicts of tensors).
    step: batch on the device -> (loss, estimated poses N x 7); batch['pose'] is the truth.
    about: what the JSON beside the weights says.

    Adam and a step schedule by the config. Every n_freq_checkpoint epochs the weights go to
    <prefix>_checkpoint-<epoch>.pth and at the end to <prefix>_final.pth, the picture of the loss to
    <prefix>_loss_fig.png. The final weights are the mean over the steps of the last `average_last` of the training, and
    batch norm's statistics are taken anew for them, over one more epoch (Izmailov et al., UAI 2018, algorithm 1); without
    that key they are those of the last step, as published.
    """
    config = run.config
    parameters = [p for module in (model, pose_loss) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config["lr"], eps=config["eps"], weight_decay=config["weight_decay"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config["lr_scheduler_step_size"], config["lr_scheduler_gamma"])
    n_epochs, n_freq_print, n_freq_checkpoint = (config[key] for key in ("n_epochs", "n_freq_print", "n_freq_checkpoint"))

    samples, losses = [], []
    n_samples = 0
    n_steps = n_epochs * len(batches(0))
    averaged = None
    norms = {module: int(module.num_batches_tracked) for module in model.modules() if isinstance(module, _BatchNorm)}
    with logging_redirect_tqdm(), tqdm(total=n_steps, unit="batch", disable=None) as progress:
        for epoch in range(n_epochs):
            model.train()
            running_loss, n_epoch_samples = 0.0, 0
            for i, batch in enumerate(batches(epoch)):
                batch = to_device(batch, run.device)
                loss, estimate = step(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

                loss, size = loss.detach(), len(batch["pose"])
                running_loss, n_epoch_samples, n_samples = running_loss + loss * size, n_epoch_samples + size, n_samples + size
                samples.append(n_samples)
                losses.append(loss)
                progress.update()
                if len(losses) > n_steps * (1 - config.get("average_last", 0)):
                    averaged = averaged or AveragedModel(model)
                    averaged.update_parameters(model)
                if i % n_freq_print == 0:
                    errors = (e.mean().item() for e in pose_err(estimate.detach(), batch["pose"]))
                    logging.info("[Batch-{}/Epoch-{}] running camera pose loss: {:.3f}, camera pose error: {:.2f}[m], "
                                 "{:.2f}[deg]".format(i + 1, epoch + 1, float(running_loss) / n_epoch_samples, *errors))
            scheduler.step()
            if (epoch + 1) % n_freq_checkpoint == 0:
                save_weights(f"{run.prefix}_checkpoint-{epoch + 1}.pth", model.state_dict(), about)

    if averaged:
        model.load_state_dict(averaged.module.state_dict())
        trained = [module for module, n_batches in norms.items() if module.num_batches_tracked > n_batches]  # not frozen ones
        for module in trained:
            module.reset_running_stats()
            module.momentum = None  # a mean over all batches
        if trained:
            with torch.no_grad():
                for batch in tqdm(batches(n_epochs), desc="batch norm", unit="batch", disable=None):
                    step(to_device(batch, run.device))

    logging.info("Training completed")
    save_weights(f"{run.prefix}_final.pth", model.state_dict(), about)
    plot_loss(f"{run.prefix}_loss_fig.png", samples, torch.stack(losses).tolist())
    logging.info("Weights: %s_final.pth", run.prefix)


@torch.inference_mode()
def evaluate(estimate, batches, device):
    """Run a function over a dataset, a frame at a time.

    estimate: batch on the device -> dict of N x ... tensors.

    Returns the dict of all frames' tensors on the CPU, with 'milliseconds', N: what each took, decoding left out.
    """
    results = []
    for batch in tqdm(batches, unit="frame", disable=None):
        batch = to_device(batch, device)
        if not results:
            estimate(batch)  # the first call builds and warms up; its time says nothing
        synchronize(device)
        begin = time.perf_counter()
        result = estimate(batch)
        synchronize(device)
        milliseconds = torch.tensor([1000 * (time.perf_counter() - begin)])
        results.append({key: value.cpu() for key, value in {**result, "milliseconds": milliseconds}.items()})
    return {key: torch.cat([result[key] for result in results]) for key in results[0]}


def to_device(batch, device):
    """A batch's tensors on a device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
