"""What bench.gpu checks by running the scripts: trainings that are killed and resumed, and in two processes."""
import signal
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.gpu_trial import Skipped, final_weights, losses_in, row

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SAME_WEIGHTS, SAME_LOSS = 1e-5, 0.01


def same_losses(name, ours, losses):
    """A row: whether the losses of a training are those of the one in one process, on one device."""
    if ours.keys() != losses.keys():
        raise RuntimeError(f"{len(ours)} steps, not {len(losses)}")
    largest = max(map(abs, losses.values()))
    difference = max(abs(loss - losses[step]) for step, loss in ours.items()) / largest
    return row(name, {"steps": len(losses), "loss difference / largest loss": difference}, f"<= {SAME_LOSS}",
               difference <= SAME_LOSS)


def both(trial, one, other):
    """The results of two functions that train, called at the same time."""
    _ = trial.labels  # both need it
    with ThreadPoolExecutor(1) as pool:
        of_other = pool.submit(other)
        return one(), of_other.result()


def resume(trial):
    """A training that is killed and resumed ends with the weights of one that was not."""
    killed = int(0.6 * trial.scale.n_epochs * trial.n_steps)
    apr, _ = both(trial, lambda: trial.apr, lambda: trial.train(
        "killed", steady=["--kill_after", killed], settings=trial.epochs, status=-signal.SIGKILL))
    whole = torch.load(apr)
    resumed = torch.load(final_weights(trial.train("killed", "--resume", "latest", settings=trial.epochs)))
    difference = max((value.double() - resumed[key].double()).abs().max().item() for key, value in whole.items())
    yield row("killed and resumed", {"killed after step": killed, "largest difference of weights": difference},
              f"<= {SAME_WEIGHTS}", difference <= SAME_WEIGHTS)


def move(trial):
    """A state that a GPU saved resumes on a CPU, and the other way round."""
    if not trial.on_gpu:
        raise Skipped("needs CUDA")
    killed = {"steady": ["--kill_after", 2 * trial.n_steps + 1], "status": -signal.SIGKILL}
    trial.train_frozen("moved", **killed)
    trial.train_frozen("moved", "--resume", "latest", device="cpu", **killed)
    yield same_losses("state moved from GPU to CPU and back",
                      losses_in(trial.train_frozen("moved", "--resume", "latest")), trial.losses)


def gloo(trial):
    """Two processes on one device train as one does."""
    steady = ["--share_gpu"] if trial.on_gpu else []
    losses, two = both(trial, lambda: trial.losses,
                       lambda: trial.train_frozen("gloo", launcher=TORCHRUN, steady=steady))
    yield same_losses("two processes on one device, gloo", losses_in(two), losses)


def nccl(trial):
    """Two processes on two GPUs train as one does."""
    n_gpus = torch.cuda.device_count() if trial.on_gpu else 0
    if n_gpus < 2:
        raise Skipped(f"needs two GPUs, {n_gpus} here")
    two = trial.train_frozen("nccl", launcher=TORCHRUN, device="auto")
    yield same_losses("two processes on two GPUs, NCCL", losses_in(two), trial.losses)
