"""Everything that a training changes, as one object that writes and restores itself."""
import inspect
import math
import time
from array import array

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from engine import resume
from engine.plots import CURVES
from util.errors import UserError


class Adam(torch.optim.Adam):
    """PyTorch's, without the decorators that import TorchDynamo, which takes as long as importing PyTorch."""

    add_param_group, zero_grad, state_dict, load_state_dict = (inspect.unwrap(getattr(torch.optim.Adam, name)) for name
                                                               in ("add_param_group", "zero_grad", "state_dict",
                                                                   "load_state_dict"))
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class TrainingState:
    """Everything that a training changes; it writes and restores itself.

    model, pose_loss: the trained modules. optimizer: Adam over their parameters. scaler: of fp16's gradients.
    epoch: the number of finished epochs. losses: of every step. curves: a row per epoch, see plots.CURVES.
    best: [median position error, epoch] of the best validation, [] before the first.
    average: the mean of the weights over the last steps (SWA), None before the first of these.
    """

    def __init__(self, run, model, pose_loss, scene_names):
        """Begin a training, or restore the one that `run.resumed` holds. Raises UserError where that does not fit."""
        self.run, self.model, self.pose_loss, self.scene_names = run, model, pose_loss, scene_names
        config = run.config
        self.parameters = [p for module in (model, pose_loss) for p in module.parameters() if p.requires_grad]
        self.optimizer = Adam(self.parameters, lr=config["lr"], eps=config["eps"],
                              weight_decay=config["weight_decay"], fused=True)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=model.precision == "fp16")
        self.epoch, self.losses, self.curves, self.best = 0, array("d"), [], []
        self.weights = nn.ParameterList(model.parameters())  # without buffers, which are not averaged
        self.average, self.average_start = None, math.inf
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.norm_counters = [int(norm.num_batches_tracked) for norm in self.norms]  # before the first step
        self.written_at, self.seconds_to_write = -math.inf, 0.0
        if run.resumed is not None:
            self._restore(run.resumed)
            run.resumed = None  # it is as large as the training itself

    def average_after(self, n_steps):
        """Average the weights of all steps after the first n. An average over other steps is discarded."""
        if self.average_start != n_steps:
            self.average, self.average_start = None, n_steps

    @torch.no_grad()
    def count_step(self, loss):
        """Note a step's loss, and take its weights into the average where it is due."""
        self.losses.append(loss)
        if len(self.losses) > self.average_start:
            if self.average is None:
                self.average = self._new_average()
            # Not update_parameters: it copies the count to the GPU, which makes every step wait, and rounds 1 / n.
            self.average.n_averaged += 1
            means = list(self.average.module.parameters())
            torch._foreach_lerp_(means, list(self.weights), 1 / int(self.average.n_averaged))

    def _new_average(self):
        return AveragedModel(self.weights)

    def count_epoch(self, lr, loss, errors):
        """Note an epoch's curves. Validation fills the last two in later."""
        self.epoch += 1
        self.curves.append([len(self.losses), lr, loss, *errors, math.nan, math.nan])

    def trained_norms(self):
        """The batch norms that the training updates: not the frozen ones."""
        return [norm for norm, n in zip(self.norms, self.norm_counters) if norm.num_batches_tracked > n]

    def is_due(self):
        """Whether to write the state: after every epoch, unless writing would take over a twentieth of the time."""
        return time.monotonic() - self.written_at > 20 * self.seconds_to_write

    def write(self):
        """Write the state to <prefix>_resume-<epoch>.pth."""
        begin, device = time.monotonic(), self.run.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        resume.write(self.run.prefix, {
            "weights": self.model.state_dict(), "loss": self.pose_loss.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"], "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {}, "random": random,
            "norm_counters": self.norm_counters, "epoch": self.epoch,
            "losses": torch.from_numpy(np.array(self.losses)), "curves": self.curves, "best": self.best,
            "average_start": self.average_start, "scene_names": self.scene_names, "settings": self.run.settings})
        self.written_at = time.monotonic()
        self.seconds_to_write = self.written_at - begin

    def _restore(self, state):
        if state["scene_names"] != self.scene_names:
            raise UserError(f"--resume {self.run.prefix}: the model's scenes were {state['scene_names']} and are "
                            f"{self.scene_names} now; give them in their order with --set scene_names=... or as they "
                            "were given")
        try:
            self._restore_modules(state)
            self._restore_progress(state)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            problem = str(error)[:200]
            raise UserError(f"--resume {self.run.prefix}: the state does not fit this training: {problem}") from error

    def _restore_modules(self, state):
        self.model.load_state_dict(state["weights"])
        self.pose_loss.load_state_dict(state["loss"])
        # The learning rate and the like are the config's.
        param_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": param_groups})
        for parameter, moments in self.optimizer.state.items():
            if set(moments) != {"step", "exp_avg", "exp_avg_sq"} or any(
                    moments[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer is not Adam")
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if state["average"]:
            self.average = self._new_average()
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.run.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.run.device)

    def _restore_progress(self, state):
        self.epoch, self.average_start = state["epoch"], state["average_start"]
        self.losses = array("d", state["losses"].tolist())
        self.curves = [[int(n), *map(float, values)] for n, *values in state["curves"]]
        if any(len(row) != len(CURVES) for row in self.curves):
            raise ValueError("its curves have other columns")
        self.best = [float(state["best"][0]), int(state["best"][1])] if state["best"] else []
        self.norm_counters = state["norm_counters"]
        if [type(n) for n in self.norm_counters] != [int] * len(self.norms):
            raise ValueError("its batch norms differ")
