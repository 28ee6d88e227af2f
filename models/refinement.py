"""Refinement of an APR's poses at test time, by a PAE and reference poses.

A query is a test frame, with the APR's pose and latents. References are training poses, which the PAE encodes into
latents. A solver corrects the query's pose by comparing its latents with the references' encodings.
"""
import numpy as np
import torch
import torch.nn.functional as F

from models import SOLVERS_WITH_NOISE
from models.latent_memory import whitening
from util.config import Config
from util.rotations import mean_quaternion, multiply_quaternions, on_side_of, quaternion_of, unit_poses
from util.seeds import epoch_generator

MIN_REFERENCES = 32  # per scene, for SOLVERS_WITH_NOISE
CHUNK = 1024  # queries at a time, so that memory grows with the number of references alone
_MLP_CHUNK = 32  # MLPs at a time; each has 0.3 million weights
_N_STEPS = 10  # Gauss-Newton steps of `invert`
_DIFFERENCE = 1e-3  # step of its central differences: in units of the scene's scale, and in radians


def queries_of(result):
    """Return the queries of refinement from an APR's outputs, as `models.infer` returns them.

    They are {'pose': N x 7, 'latents': N x 2 latent_dim (position's, then orientation's), 'scene': N}. The scene is 0
    for single-scene models.
    """
    scene = result.get("scene", torch.zeros(result["pose"].shape[0], dtype=torch.long, device=result["pose"].device))
    latents = torch.cat((result["latent_x"], result["latent_q"]), dim=1)
    return {"pose": result["pose"], "latents": latents, "scene": scene}


def optimize(solver, encoder, queries, references, reference_scenes, config, seed=0):
    """Refine an APR's poses by a solver of models.SOLVERS.

    encoder: the PAE.
    queries: as `queries_of` returns them, N of them.
    references: R x 7 training poses with unit quaternions. reference_scenes: R, or -1 for a scene of no query. kernel
        reads neither: it takes the PAE's memory instead.
    config: for mlp and simplex, 'num_neighbors' (3), 'nearest_by' ('pose') and 'refine_orientation' (None); for mlp
        also 'test_optim_iterations' (3).
    seed: for mlp, whose initial weights depend on it.

    Returns poses N x 7 with unit quaternions, and a boolean mask N of the refined queries. The others keep the
    APR's pose: their scene has no references or, for SOLVERS_WITH_NOISE, fewer than MIN_REFERENCES; for kernel, the PAE
    does not remember their scene.
    """
    if solver == "kernel":
        return encoder.memory.corrected(encoder, queries)
    config = Config(config)
    known = reference_scenes >= 0
    references, reference_scenes = references[known], reference_scenes[known]
    queries = {**queries, "raw_pose": queries["pose"], "pose": unit_poses(queries["pose"])}
    if solver in SOLVERS_WITH_NOISE:
        return _solve_per_scene(solver, encoder, queries, references, reference_scenes, config)
    return _blend_nearest(solver, encoder, queries, references, reference_scenes, config, seed)


def _blend_nearest(solver, encoder, queries, references, reference_scenes, config, seed):
    """Refine by weighted means of the references nearest to the APR's estimate: mlp and simplex."""
    poses = queries["pose"].clone()
    distances = {"pose": pose_distances, "published": published_distances}[config["nearest_by"]]
    nearest = nearest_references(queries["raw_pose"], queries["scene"], references, reference_scenes,
                                 config["num_neighbors"], distances)
    refined = nearest[:, 0] >= 0
    rows = refined.nonzero().squeeze(1)
    neighbours = references[nearest[rows]]
    encoded = encoded_for(encoder, poses[rows], queries["scene"][rows], neighbours)
    latents = queries["latents"][rows]
    if solver == "mlp":
        weights = mlp_weights(encoded, latents, rows.tolist(), seed, config["test_optim_iterations"])
    elif solver == "simplex":
        weights = simplex_weights(encoded, latents)
    else:
        raise ValueError(f"unknown solver {solver}")
    poses[rows] = weighted_poses(weights, neighbours, poses[rows], config["refine_orientation"])
    return poses, refined


def _solve_per_scene(solver, encoder, queries, references, reference_scenes, config):
    """Refine with all references of the query's scene and the PAE's noise: SOLVERS_WITH_NOISE."""
    poses = queries["pose"].clone()
    refined = torch.zeros(len(poses), dtype=torch.bool, device=poses.device)
    encoded = torch.cat(encoder(references, reference_scenes), dim=1)
    for scene in queries["scene"].unique():
        of_scene, rows = reference_scenes == scene, queries["scene"] == scene
        if of_scene.sum() < MIN_REFERENCES:
            continue
        noise = encoder.noise
        if not noise.any():  # a published PAE holds none: take the same variance in all directions
            noise = encoded[of_scene].var(dim=0).mean().clamp(min=1e-9) * torch.eye(len(noise), device=noise.device)
        given = references[of_scene], encoded[of_scene], noise
        latents = queries["latents"][rows]
        if solver == "linear":
            poses[rows] = linear_estimate(latents, *given)
        elif solver == "inversion":
            poses[rows] = torch.cat([invert(encoder, chunk, scene, *given) for chunk in latents.split(CHUNK)])
        else:
            raise ValueError(f"unknown solver {solver}")
        refined[rows] = True
    return poses, refined


def encoded_for(encoder, poses, scenes, references):
    """Return the encodings of each query's references: N x k x 2 latent_dim.

    poses: N x 7 and scenes: N, of the queries; references: N x k x 7. A published PAE does not choose the sign of
    quaternions, and was trained on the APR's estimates. So its references get the sign nearer to the query's estimate.
    """
    if not encoder.takes_unit_quaternions:
        orientations = on_side_of(references[..., 3:], poses[:, None, 3:])
        references = torch.cat((references[..., :3], orientations), dim=2)
    k = references.shape[1]
    encoded = torch.cat(encoder(references.flatten(0, 1), scenes.repeat_interleave(k)), dim=1)
    return encoded.unflatten(0, (len(poses), k))


def linear_estimate(latents, references, encoded, noise):
    """Return the linear minimum mean square error (LMMSE) estimates of poses from latents: N x 7.

    It is the update of an ensemble Kalman filter (Evensen, 1994) with the references as ensemble: poses are distributed
    as the references, and latents are the encodings of poses plus noise.

    latents: N x D; references: R x 7; encoded: R x D, their encodings; noise: D x D, its covariance. Quaternions are
    estimated with the sign nearer to the references' mean, then normalised.
    """
    references, encoded = references.double(), encoded.double()
    quaternions = references[:, 3:]
    poses = torch.cat((references[:, :3], on_side_of(quaternions, mean_quaternion(quaternions))), dim=1)
    poses_off, encoded_off = poses - poses.mean(dim=0), encoded - encoded.mean(dim=0)
    covariance = encoded_off.T @ encoded_off / len(encoded) + noise.double()
    # The noise was measured on training frames, on which the APR errs less. So add a hundredth of the mean variance.
    covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
    gain = torch.linalg.solve(covariance, encoded_off.T @ poses_off / len(encoded))
    estimates = poses.mean(dim=0) + (latents.double() - encoded.mean(dim=0)) @ gain
    return unit_poses(estimates).float()


def invert(encoder, latents, scene, references, encoded, noise):
    """Return the poses whose encodings are nearest to latents of one scene: N x 7.

    Distances are under the inverse of the noise covariance, to which a tenth of its mean variance is added in all
    directions. Each search starts at the nearest reference and takes damped Gauss-Newton steps (Levenberg, 1944).

    latents: N x D; references: R x 7; encoded: R x D, their encodings; noise: D x D.
    """
    whiten = whitening(noise)
    targets = latents @ whiten
    poses = references[torch.cdist(targets, encoded @ whiten).argmin(dim=1)]
    scenes = scene.expand(len(poses))
    # A step is a translation in units of the scene's scale, then a rotation vector in radians.
    units = torch.cat((encoder.scale[scene].expand(3), torch.ones(3, device=poses.device)))

    def moved(steps):
        steps = steps * units
        orientations = multiply_quaternions(quaternion_of(steps[:, 3:]), poses[:, 3:])
        return torch.cat((poses[:, :3] + steps[:, :3], orientations), dim=1)

    def residuals(steps):
        return torch.cat(encoder(moved(steps), scenes), dim=1) @ whiten - targets

    still = torch.zeros(len(poses), 6, device=poses.device)
    differences = _DIFFERENCE * torch.eye(6, device=poses.device)
    damping = torch.full((len(poses), 1), 1e-2, device=poses.device)
    for _ in range(_N_STEPS):
        jacobian = torch.stack([
            (residuals(step.expand_as(still)) - residuals(-step.expand_as(still))) / (2 * _DIFFERENCE)
            for step in differences], dim=2)
        now = residuals(still)
        hessian = jacobian.mT @ jacobian
        damped = hessian + torch.diag_embed(damping * hessian.diagonal(dim1=1, dim2=2) + 1e-9)
        steps = -torch.linalg.solve(damped, (jacobian.mT @ now.unsqueeze(2)).squeeze(2))
        better = residuals(steps).square().sum(dim=1, keepdim=True) < now.square().sum(dim=1, keepdim=True)
        poses = torch.where(better, moved(steps), poses)
        damping = torch.where(better, damping / 5, damping * 5)
    return unit_poses(poses)


def mlp_weights(encoded, latents, rows, seed, n_iterations):
    """Return weights of k references by the paper's test-time optimisation (section 3.3): N x k, positive, with sum 1.

    Per query, an MLP computes the weights from the references' encodings. AdamW trains a new MLP for every query, so
    that the weighted sum of the encodings comes near the query's latents.

    encoded: N x k x D; latents: N x D; rows: N numbers that, with the seed, determine the MLPs' initial weights.
    """
    n, k, dim = encoded.shape
    sizes = (k * dim, 64 * k, 32 * k, 16 * k, k)
    if n > _MLP_CHUNK:
        chunks = zip(encoded.split(_MLP_CHUNK), latents.split(_MLP_CHUNK),
                     (rows[i:i + _MLP_CHUNK] for i in range(0, n, _MLP_CHUNK)))
        return torch.cat([mlp_weights(*chunk, seed, n_iterations) for chunk in chunks])
    matrices = [torch.empty(n, i, o) for i, o in zip(sizes, sizes[1:])]
    biases = [torch.zeros(n, 1, o) for o in sizes[1:]]
    for i, row in enumerate(rows):
        generator = epoch_generator(seed, row)
        for matrix in matrices:
            bound = (6 / (matrix.shape[1] + matrix.shape[2])) ** 0.5  # Xavier
            matrix[i].uniform_(-bound, bound, generator=generator)
    matrices, biases = ([parameter.to(encoded.device).requires_grad_() for parameter in parameters]
                        for parameters in (matrices, biases))

    def weights():
        hidden = encoded.flatten(1).unsqueeze(1)
        for i, (matrix, bias) in enumerate(zip(matrices, biases)):
            hidden = torch.baddbmm(bias, hidden.relu() if i else hidden, matrix)
        return hidden.squeeze(1).softmax(dim=1)

    optimizer = torch.optim.AdamW([*matrices, *biases], lr=1e-2, fused=True)
    with torch.enable_grad():
        for _ in range(n_iterations):
            blended = torch.einsum("nk,nkd->nd", weights(), encoded)
            loss = (blended - latents).square().mean(dim=1).sum()  # summed, each query's gradient is its own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights().detach()


def simplex_weights(encoded, latents):
    """Return the weights of k references whose weighted encodings come nearest to the latents: N x k.

    The weights are not negative and have sum 1. They are the minimum of the objective of `mlp_weights`.

    encoded: N x k x D; latents: N x D. Let the columns of A be the encodings minus the latents. With sum 1, the
    objective is |A w|^2. The w >= 0 that minimises |A w|^2 + (sum w - 1)^2 is a positive multiple of the solution, as
    the optimality conditions of both problems show.
    """
    from scipy.optimize import nnls  # here, since it takes as long to import as a test of a hundred frames

    differences = (encoded - latents.unsqueeze(1)).mT.double()
    scale = differences.norm(dim=1).amax(dim=1).clamp(min=1e-300)  # so that neither term dominates
    systems = F.pad(differences / scale[:, None, None], (0, 0, 0, 1), value=1).cpu().numpy()
    target = np.zeros(systems.shape[1])
    target[-1] = 1
    weights = torch.tensor(np.array([nnls(system, target)[0] for system in systems])).reshape(encoded.shape[:2])
    return (weights / weights.sum(dim=1, keepdim=True)).to(encoded)


def weighted_poses(weights, references, poses, refine_orientation):
    """Return the weighted means of references: N x 7.

    weights: N x k; references: N x k x 7; poses: N x 7, the APR's. refine_orientation chooses the quaternions: None
    keeps those of `poses`, 'affine' normalises the weighted sum of the references' (each with the sign nearer to the
    first), and 'eigen' takes the weighted mean rotation.
    """
    positions = torch.einsum("nk,nkd->nd", weights, references[:, :, :3])
    quaternions = references[:, :, 3:]
    if refine_orientation is None:
        orientations = poses[:, 3:]
    elif refine_orientation == "affine":
        one_sided = on_side_of(quaternions, quaternions[:, :1])
        orientations = F.normalize(torch.einsum("nk,nkd->nd", weights, one_sided), dim=1)
    else:
        orientations = mean_quaternion(quaternions, weights)
    return torch.cat((positions, orientations), dim=1)


def pose_distances(poses, references):
    """Return how far references are from poses: N x 7, R x 7 -> N x R.

    The distance between positions and the distance between unit quaternions (of the nearer sign) are each divided by
    their maximum over the references, then added.
    """
    # Matrix products would lose decimetres at 150 m.
    positions = torch.cdist(poses[:, :3], references[:, :3], compute_mode="donot_use_mm_for_euclid_dist")
    cosines = F.normalize(poses[:, 3:], dim=1) @ F.normalize(references[:, 3:], dim=1).T
    orientations = (2 - 2 * cosines.abs()).clamp(min=0).sqrt()
    return _sum_over_maxima(positions, orientations)


def published_distances(poses, references):
    """Return the distances by which the published code looks references up: N x 7, R x 7 -> N x R.

    They are `pose_distances`, but of the APR's quaternions as they are, whose norms of 40 and more make the distances
    of orientations to all references nearly the same.
    """
    parts = (torch.cdist(poses[:, part], references[:, part], compute_mode="donot_use_mm_for_euclid_dist")
             for part in (slice(3), slice(3, 7)))
    return _sum_over_maxima(*parts)


def _sum_over_maxima(*distances):
    """The sum of distances, N x R each, over their maxima over the references."""
    # The bound is for maxima of 0: all references are the same.
    return sum(d / d.amax(dim=1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny) for d in distances)


def nearest_references(poses, scenes, references, reference_scenes, k, distances=pose_distances):
    """Return the rows of the k nearest references of the same scene: N x k, nearest first.

    poses: N x 7; scenes: N; references: R x 7; reference_scenes: R. distances: how far they are, poses, references ->
    N x R. If a scene has fewer than k references, they repeat. If it has none, the rows are -1.
    """
    nearest = torch.full((len(poses), k), -1, device=poses.device)
    for scene in scenes.unique():
        candidates = (reference_scenes == scene).nonzero().squeeze(1)
        n_nearest = min(k, len(candidates))
        if n_nearest == 0:
            continue
        for queries in (scenes == scene).nonzero().squeeze(1).split(CHUNK):
            found = candidates[distances(poses[queries], references[candidates]).topk(n_nearest, largest=False).indices]
            nearest[queries] = found[:, torch.arange(k, device=poses.device) % n_nearest]
    return nearest
