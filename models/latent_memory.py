"""What a PAE's file remembers of training frames: where the APR's latents are known, and how the APR errs there.

A PAE says which latents a pose should have. Its memory holds latents that training frames had, with their poses. Two
things follow for a query, a frame with the APR's latents and pose:

novelty: how far its latents are from what the PAE and the memory expect of its pose. 1 is a training frame's median.
corrections: the APR's errors on training frames, carried over to the query by kernel ridge regression on the latents.

Both are measured on held-out folds: stretches of training frames that are left out of the memory in turns.
"""
import numpy as np
import torch
from torch import nn

from util.metrics import pose_err
from util.rotations import conjugate, multiply_quaternions, on_side_of, quaternion_of, unit_poses

N_FRAMES, MIN_FRAMES = 256, 32  # that are remembered per scene; below MIN_FRAMES, a scene has no memory
_FOLDS = 10
_LENGTH = 0.5  # of the kernel, in median distances between remembered latents
_RIDGE = 0.1  # of the regression: the variance of noise in units of the prior's
_DEGREES = 20  # of freedom of the distribution of latents around remembered ones, see `_raw_novelty`
_KNOTS = 32  # of piecewise linear curves
_UNKNOWN = 1.5, 90  # times the novelty that calibration reached, and degrees: there, a frame could be anywhere


class LatentMemory(nn.Module):
    """The memory of a PAE, empty until `fit`. All that it holds are buffers, which the PAE's file keeps.

    latents, poses, scenes: of M remembered frames, M x D, M x 7, M; weights: M x 6, of the regression.
    length, unit: per scene, the kernel's length and the novelty of a median training frame before it is 1.
    trust: per scene, _KNOTS x 3: at a distance, the shares of the corrections of position and orientation to apply.
    calibration: K x 5, expected errors at a novelty: of the APR's position (metres) and orientation (degrees), then of
        the corrected pose's. K is 0 without validation.
    """

    def __init__(self, latent_dim, num_scenes):
        """latent_dim: D, of both latents together."""
        super().__init__()
        for name, shape in {"latents": (0, latent_dim), "poses": (0, 7), "weights": (0, 6), "length": (num_scenes,),
                            "unit": (num_scenes,), "trust": (num_scenes, _KNOTS, 3), "calibration": (0, 5)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("scenes", torch.zeros(0, dtype=torch.long))
        self._whiten = None  # the noise's whitening, which takes as long as an APR's image

    def __len__(self):
        """The number of remembered frames."""
        return len(self.latents)

    def knows(self, scenes):
        """Which of N queries are of a scene that is remembered. scenes: N indices."""
        return (scenes[:, None] == self.scenes.unique()).any(dim=1)

    @torch.no_grad()
    def fit(self, encoder, frames):
        """Remember training frames, evenly spaced among each scene's, and forget all others.

        encoder: the PAE, whose `noise` is fitted. frames: queries as `models.refinement.queries_of` gives them, in the
        order of their sequences, with 'truth', the true poses, N x 7.
        """
        remembered = [self._fit_scene(encoder, {key: rows[frames["scene"] == scene] for key, rows in frames.items()})
                      for scene in frames["scene"].unique() if (frames["scene"] == scene).sum() >= MIN_FRAMES]
        for name in ("latents", "poses", "scenes", "weights"):
            empty = getattr(self, name)[:0]
            setattr(self, name, torch.cat([empty, *(part[name].to(empty) for part in remembered)]))
        self.calibration, self._whiten = self.calibration[:0], None

    def _whitening(self, encoder):
        """The whitening of the PAE's noise, computed once after `fit`, or after loading."""
        if self._whiten is None or self._whiten.device != encoder.noise.device:
            self._whiten = whitening(encoder.noise)
        return self._whiten

    def _distances(self, encoder, latents, of_scene):
        """Mahalanobis distances of latents, N x D, to M remembered ones: N x M. of_scene: which those are."""
        whiten = self._whitening(encoder)
        return torch.cdist(latents @ whiten, self.latents[of_scene] @ whiten)

    def _fit_scene(self, encoder, frames):
        """Fit one scene's part of the memory. Returns its rows."""
        scene, truth, n = frames["scene"][0], unit_poses(frames["truth"]), len(frames["truth"])
        kept = torch.linspace(0, n - 1, min(n, N_FRAMES), device=truth.device).round().long()
        whiten = whitening(encoder.noise)
        whitened = frames["latents"] @ whiten
        distances = torch.cdist(whitened, whitened[kept])
        self.length[scene] = _LENGTH * distances[kept].median().clamp(min=1e-9)
        kernel = _kernel(distances, self.length[scene])
        errors = _differences(truth, unit_poses(frames["pose"]))
        # Subset of regressors (Quinonero-Candela & Rasmussen, JMLR 2005): all frames, kernels at the remembered ones.
        normal = kernel.T @ kernel + _RIDGE * kernel[kept]
        normal.diagonal().add_(1e-6)
        weights = torch.linalg.solve(normal, kernel.T @ errors)

        own = _own_distances(encoder, frames, whiten)
        held_out = []
        for fold in torch.arange(n, device=truth.device).tensor_split(_FOLDS):
            others = (kept < fold[0]) | (kept > fold[-1])
            of_fold = kernel[fold]
            solved = torch.linalg.solve((normal - of_fold.T @ of_fold)[others][:, others],
                                        (kernel.T @ errors - of_fold.T @ errors[fold])[others])
            held_out.append((distances[fold][:, others].min(dim=1).values, of_fold[:, others] @ solved,
                             _raw_novelty(distances[fold][:, others], unit_poses(frames["pose"][fold]),
                                          truth[kept][others], own[fold])))
        distance, predicted, novelty = (torch.cat(parts) for parts in zip(*held_out))
        self.unit[scene] = novelty.median().clamp(min=1e-30)
        self.trust[scene] = _trust(distance, predicted, errors).to(self.trust)
        return {"latents": frames["latents"][kept], "poses": truth[kept], "scenes": frames["scene"][kept],
                "weights": weights}

    @torch.no_grad()
    def corrected(self, encoder, queries):
        """Return corrected poses of N queries, N x 7, and a mask N of those whose scene is remembered.

        The others keep the APR's pose, and so does a query the further its latents are from every remembered one.
        """
        poses, known = unit_poses(queries["pose"]), self.knows(queries["scene"])
        for scene in queries["scene"][known].unique():
            rows, of_scene = queries["scene"] == scene, self.scenes == scene
            distances = self._distances(encoder, queries["latents"][rows], of_scene)
            steps = _kernel(distances, self.length[scene]) @ self.weights[of_scene].double()
            nearest = distances.min(dim=1).values.cpu()
            knots, *shares = self.trust[scene].T.cpu().numpy()
            of_position, of_orientation = (torch.from_numpy(np.interp(nearest, knots, share, right=0)).to(steps)
                                           for share in shares)
            steps = (steps * torch.stack((of_position, of_orientation), dim=1).repeat_interleave(3, dim=1)).to(poses)
            orientations = multiply_quaternions(quaternion_of(steps[:, 3:]), poses[rows, 3:])
            poses[rows] = torch.cat((poses[rows, :3] + steps[:, :3], orientations), dim=1)
        return poses, known

    @torch.no_grad()
    def novelty(self, encoder, queries):
        """Return the novelty of N queries: N, NaN for scenes that are not remembered."""
        novelty = torch.full((len(queries["pose"]),), torch.nan, device=queries["pose"].device)
        own = _own_distances(encoder, queries, self._whitening(encoder))
        for scene in queries["scene"][self.knows(queries["scene"])].unique():
            rows, of_scene = queries["scene"] == scene, self.scenes == scene
            distances = self._distances(encoder, queries["latents"][rows], of_scene)
            raw = _raw_novelty(distances, unit_poses(queries["pose"][rows]), self.poses[of_scene], own[rows])
            novelty[rows] = (raw / self.unit[scene]).to(novelty)
        return novelty

    def traceable_novelty(self, encoder, queries):
        """The same as `novelty`, as one expression that does not depend on what the queries hold, for exports."""
        of_scene = queries["scene"][:, None] == self.scenes
        whiten = self._whitening(encoder)
        latents, remembered = ((rows @ whiten).double() for rows in (queries["latents"], self.latents))
        squares = (latents.square().sum(dim=1, keepdim=True) + remembered.square().sum(dim=1)
                   - 2 * latents @ remembered.T)
        distances = squares.clamp(min=0).sqrt().masked_fill(~of_scene, torch.inf)
        raw = _raw_novelty(distances, unit_poses(queries["pose"]), self.poses,
                           _own_distances(encoder, queries, whiten))
        novelty = (raw / self.unit[queries["scene"]]).float()
        return novelty.masked_fill(~of_scene.any(dim=1), torch.nan)

    @torch.no_grad()
    def calibrate(self, encoder, frames):
        """Fit expected errors to those of frames that were not trained on: isotonic regression on their novelty.

        frames: as for `fit`. Beyond the novelty of nearly all of them, expected errors rise to those of a guess: the
        mean distance between remembered poses, and _UNKNOWN degrees.
        """
        novelty = self.novelty(encoder, frames)
        known = torch.isfinite(novelty)
        if known.sum() < MIN_FRAMES:
            return
        order = novelty.masked_fill(~known, torch.inf).argsort()[:known.sum()]
        estimates = unit_poses(frames["pose"]), self.corrected(encoder, frames)[0]
        errors = [error[order].cpu().numpy() for poses in estimates for error in pose_err(poses, frames["truth"])]
        novelty = novelty[order].double().cpu().numpy()
        usual = max(np.quantile(novelty, 0.95), 2)
        knots = np.append(np.quantile(novelty[novelty <= usual], np.linspace(0, 1, _KNOTS - 2)), usual)
        distances = [torch.pdist(self.poses[self.scenes == scene, :3]).mean().item() for scene in self.scenes.unique()]
        curves = []
        for error, guess in zip(errors, (np.mean(distances), _UNKNOWN[1]) * 2):
            curve = np.interp(knots, novelty, _isotonic(error))
            curves.append(np.append(curve, max(guess, curve[-1])))
        knots = np.append(knots, _UNKNOWN[0] * usual)
        self.calibration = torch.tensor(np.stack((knots, *curves), axis=1)).to(self.unit)

    def expected_errors(self, novelty):
        """Return the expected errors of N frames, N x 4, as the columns of `calibration`; NaN for a novelty of NaN."""
        knots, *curves = self.calibration.T.double().cpu().numpy()
        return torch.tensor(np.stack([np.interp(novelty.cpu(), knots, curve) for curve in curves], axis=1))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, problems):
        self._whiten = None
        n_frames = len(state_dict.get(f"{prefix}latents", ()))
        for name, buffer in self.named_buffers():
            tensor = state_dict.setdefault(prefix + name, buffer)  # earlier files and published ones have no memory
            if name in ("latents", "poses", "weights", "scenes") and len(tensor) != n_frames:
                problems.append(f"{prefix}{name} has {len(tensor)} frames, but {prefix}latents has {n_frames}")
            elif len(buffer) == 0 and tensor.shape[1:] == buffer.shape[1:]:
                setattr(self, name, torch.zeros_like(tensor, dtype=buffer.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, problems)


def whitening(noise):
    """Return the matrix W, D x D, under which distances of x @ W are Mahalanobis distances of x.

    noise: D x D, the covariance. A tenth of its mean variance is added in all directions, since it may be singular.
    """
    noise = noise.double()
    noise = noise + 0.1 * noise.diagonal().mean() * torch.eye(len(noise), dtype=noise.dtype, device=noise.device)
    return torch.linalg.inv(torch.linalg.cholesky(noise)).T.float()


def _kernel(distances, length):
    return torch.exp(-0.5 * (distances.double() / length.double()).square())


def _differences(truth, estimates):
    """Steps from estimated poses to the true ones: N x 6 (float64), translations and rotation vectors.

    The rotation vector of an angle a has the length 2 sin(a/2), so that no error counts more than 2.
    """
    turns = multiply_quaternions(truth[:, 3:], conjugate(estimates[:, 3:]))
    turns = on_side_of(turns, torch.tensor([1.0, 0, 0, 0], device=turns.device))
    return torch.cat((truth[:, :3] - estimates[:, :3], 2 * turns[:, 1:]), dim=1).double()


def _own_distances(encoder, queries, whiten):
    """Return how far queries' latents are from the encoding of the APR's own pose: N."""
    encoded = torch.cat(encoder(queries["pose"], queries["scene"]), dim=1)
    return ((queries["latents"] - encoded) @ whiten).norm(dim=1)


def _raw_novelty(distances, poses, remembered, own):
    """Return novelty before it is divided by a median training frame's: N.

    It is the product of three: how far the APR's pose is from those of remembered frames with similar latents (the
    geometric mean of metres and radians), how far the latents are from the nearest remembered ones, and `own`, how far
    from the encoding of the APR's pose, N. The first is a mean under a posterior: a query's latents are distributed
    around one of the remembered latents, which one is unknown, with tails so heavy that only ratios of distances count.

    distances: N x M, to the remembered latents. poses: N x 7. remembered: M x 7, poses.
    """
    posterior = (-_DEGREES * distances.double().clamp(min=1e-12).log()).softmax(dim=1)
    metres = (poses[:, None, :3] - remembered[:, :3]).norm(dim=2)  # torch.cdist cannot be exported
    cosines = (poses[:, 3:].double() @ remembered[:, 3:].double().T).abs().clamp(max=1)
    radians = 4 * ((1 - cosines) / 2).sqrt().float().asin()  # 2 acos, which ONNX Runtime has in float32 only
    disagreement = ((posterior * metres).sum(dim=1) * (posterior * radians).sum(dim=1)).sqrt()
    return disagreement * distances.min(dim=1).values * own


def _trust(distance, predicted, errors):
    """Return the shares of corrections to apply, at distances: _KNOTS x 3, see LatentMemory.

    A share is the factor on corrections with which they come nearest to the errors, on held-out frames at that
    distance: isotonic regression, so that shares only fall as distances grow.

    distance: N, of held-out frames to the nearest remembered latents. predicted, errors: N x 6.
    """
    order = distance.argsort()
    distance, predicted, errors = (values[order].cpu().double() for values in (distance, predicted, errors))
    knots = np.quantile(distance, np.linspace(0, 1, _KNOTS))
    columns = [knots]
    for part in (slice(3), slice(3, 6)):
        weights = predicted[:, part].square().sum(dim=1) + 1e-12
        ratios = (predicted[:, part] * errors[:, part]).sum(dim=1) / weights
        share = _isotonic(ratios.numpy(), weights=weights.numpy(), increasing=False).clip(0, 1)
        columns.append(np.interp(knots, distance, share))
    return torch.tensor(np.stack(columns, axis=1))


def _isotonic(values, **options):
    """The monotonic sequence that is nearest to values, by SciPy."""
    from scipy.optimize import isotonic_regression  # here, since no test needs it

    return isotonic_regression(values, **options).x
