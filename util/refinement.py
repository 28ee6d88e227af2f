"""Refinement of an APR's poses at test time: its latents of a query, compared with a PAE's encodings of reference poses."""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from datasets.camera_poses import epoch_generator
from util.references import CHUNK, nearest_references
from util.rotations import mean_quaternion, multiply_quaternions, on_side_of, quaternion_of, unit_poses

LEAST_REFERENCES = 32  # of a scene, for linear and inversion
_CHUNK_OF_MLPS = 32  # a query's has 0.3 million weights
_N_STEPS, _DIFFERENCE = 10, 1e-3  # Gauss-Newton steps; of central differences, in a scene's units and radians


def optimize(solver, encoder, queries, references, reference_scenes, config, seed=0):
    """Refine an APR's poses by a solver: linear, inversion, mlp or simplex.

    encoder: the PAE.
    queries: 'pose' N x 7, 'latents' N x 2 latent_dim (position's, then orientation's) and 'scene', N, all of the APR.
    references: R x 7 training poses with unit quaternions, of reference_scenes, R; -1 for a scene that no query has.
    config: has, for mlp and simplex, 'num_neighbors' (3), 'refine_orientation' (None) and, for mlp,
        'test_optim_iterations' (3).

    Returns poses N x 7 with unit quaternions, and which of the N were refined: the others' scenes have no references or,
    for linear and inversion, fewer than LEAST_REFERENCES; they keep the APR's pose.
    """
    poses = unit_poses(queries["pose"])
    known = reference_scenes >= 0
    references, reference_scenes = references[known], reference_scenes[known]
    refined = torch.zeros(len(poses), dtype=torch.bool, device=poses.device)
    if solver in ("mlp", "simplex"):
        nearest = nearest_references(poses, queries["scene"], references, reference_scenes, config.get("num_neighbors", 3))
        refined = nearest[:, 0] >= 0
        rows = refined.nonzero().squeeze(1)
        latents, of_nearest = queries["latents"][rows], encoded_for(encoder, poses[rows], queries["scene"][rows], references[nearest[rows]])
        if solver == "mlp":
            weights = mlp_weights(of_nearest, latents, rows.tolist(), seed, config.get("test_optim_iterations", 3))
        else:
            weights = simplex_weights(of_nearest, latents)
        poses[rows] = weighted_poses(weights, references[nearest[rows]], poses[rows], config.get("refine_orientation"))
        return poses, refined

    encoded = torch.cat(encoder(references, reference_scenes), dim=1)
    for scene in queries["scene"].unique():
        of_scene, rows = reference_scenes == scene, queries["scene"] == scene
        if of_scene.sum() < LEAST_REFERENCES:
            continue
        noise = encoder.noise
        if not noise.any():  # of a published PAE: the same in all directions
            noise = encoded[of_scene].var(dim=0).mean().clamp(min=1e-9) * torch.eye(len(noise), device=noise.device)
        given = references[of_scene], encoded[of_scene], noise
        if solver == "linear":
            poses[rows] = linear_estimate(queries["latents"][rows], *given)
        else:
            poses[rows] = torch.cat([invert(encoder, latents, scene, *given) for latents in queries["latents"][rows].split(CHUNK)])
        refined[rows] = True
    return poses, refined


def encoded_for(encoder, poses, scenes, references):
    """Encodings of the references of each query: poses N x 7, scenes N, references N x k x 7 -> N x k x 2 latent_dim.

    A published PAE encodes quaternions as it is given them, and has seen those of the APR's estimates: its references get
    the sign that is nearer to the query's estimate.
    """
    if not encoder.takes_unit_quaternions:
        orientations = on_side_of(references[..., 3:], poses[:, None, 3:])
        references = torch.cat((references[..., :3], orientations), dim=2)
    k = references.shape[1]
    encoded = torch.cat(encoder(references.flatten(0, 1), scenes.repeat_interleave(k)), dim=1)
    return encoded.unflatten(0, (len(poses), k))


def linear_estimate(latents, references, encoded, noise):
    """The linear estimate of a pose from latents that has the least expected squared error where poses are drawn from the
    references and latents are their encodings plus noise (the Kalman filter's update, with the references as ensemble).

    latents N x D; references R x 7 and their encodings R x D; noise: the covariance of latents around encodings, D x D.
    Returns N x 7. Quaternions are taken on the mean's side and their estimate is normalised.
    """
    references, encoded = references.double(), encoded.double()
    quaternions = references[:, 3:]
    poses = torch.cat((references[:, :3], on_side_of(quaternions, mean_quaternion(quaternions))), dim=1)
    poses_off, encoded_off = poses - poses.mean(dim=0), encoded - encoded.mean(dim=0)
    covariance = encoded_off.T @ encoded_off / len(encoded) + noise.double()
    # The noise was seen on training frames, which the APR knows too well: a hundredth more, the same in all directions.
    covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
    gain = torch.linalg.solve(covariance, encoded_off.T @ poses_off / len(encoded))
    estimates = poses.mean(dim=0) + (latents.double() - encoded.mean(dim=0)) @ gain
    return unit_poses(estimates).float()


def invert(encoder, latents, scene, references, encoded, noise):
    """The pose whose encoding is nearest to the latents, under the inverse covariance of latents around encodings (with a tenth
    of its mean variance added in all directions): from the nearest reference by damped Gauss-Newton steps (Levenberg, 1944) on
    the PAE's input.

    latents N x D of one scene; references R x 7 and their encodings R x D; noise D x D. Returns N x 7.
    """
    noise = noise.double()
    noise = noise + 0.1 * noise.diagonal().mean() * torch.eye(len(noise), dtype=noise.dtype, device=noise.device)
    whiten = torch.linalg.inv(torch.linalg.cholesky(noise)).T.float()
    targets = latents @ whiten
    poses = references[torch.cdist(targets, encoded @ whiten).argmin(dim=1)]
    scenes = scene.expand(len(poses))
    units = torch.cat((encoder.scale[scene].expand(3), torch.ones(3, device=poses.device)))  # of a step: metres, radians

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
        jacobian = torch.stack([(residuals(step.expand_as(still)) - residuals(-step.expand_as(still))) / (2 * _DIFFERENCE)
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
    """Weights of k references by the paper's test-time optimisation (section 3.3): an MLP on their encodings gives them, and
    AdamW trains it, anew for every query, so that the references' weighted encodings come near the query's latents.

    encoded N x k x D; latents N x D; rows: N numbers that with the seed determine the MLPs' initial weights. Returns N x k,
    positive, with sum 1.
    """
    n, k, dim = encoded.shape
    sizes = (k * dim, 64 * k, 32 * k, 16 * k, k)
    if n > _CHUNK_OF_MLPS:
        return torch.cat([mlp_weights(*parts, seed, n_iterations) for parts in zip(
            encoded.split(_CHUNK_OF_MLPS), latents.split(_CHUNK_OF_MLPS),
            (rows[i:i + _CHUNK_OF_MLPS] for i in range(0, n, _CHUNK_OF_MLPS)))])
    matrices, biases = [torch.empty(n, i, o) for i, o in zip(sizes, sizes[1:])], [torch.zeros(n, 1, o) for o in sizes[1:]]
    for i, row in enumerate(rows):
        generator = epoch_generator(seed, row)
        for matrix in matrices:
            bound = (6 / (matrix.shape[1] + matrix.shape[2])) ** 0.5  # Xavier
            matrix[i].uniform_(-bound, bound, generator=generator)
    matrices, biases = ([p.to(encoded.device).requires_grad_() for p in parameters] for parameters in (matrices, biases))

    def weights():
        hidden = encoded.flatten(1).unsqueeze(1)
        for i, (matrix, bias) in enumerate(zip(matrices, biases)):
            hidden = torch.baddbmm(bias, hidden.relu() if i else hidden, matrix)
        return hidden.squeeze(1).softmax(dim=1)

    optimizer = torch.optim.AdamW([*matrices, *biases], lr=1e-2, fused=True)
    with torch.enable_grad():
        for _ in range(n_iterations):
            blended = torch.einsum("nk,nkd->nd", weights(), encoded)
            loss = (blended - latents).square().mean(dim=1).sum()  # each query's own: their gradients do not meet
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights().detach()


def simplex_weights(encoded, latents):
    """The weights of k references, not negative and of sum 1, whose blended encodings come nearest to the latents: the
    minimum that the paper's optimisation descends to. encoded N x k x D; latents N x D. Returns N x k.

    With sum 1, what remains is the blend of the differences A; and the w >= 0 of least |A w|^2 + (sum w - 1)^2 is a positive
    multiple of the simplex's, as the optimality conditions of both show.
    """
    differences = (encoded - latents.unsqueeze(1)).mT.double()
    scale = differences.norm(dim=1).amax(dim=1).clamp(min=1e-300)  # so that neither term drowns the other
    systems = F.pad(differences / scale[:, None, None], (0, 0, 0, 1), value=1).cpu().numpy()
    target = np.zeros(systems.shape[1])
    target[-1] = 1
    weights = torch.tensor(np.array([nnls(system, target)[0] for system in systems])).reshape(encoded.shape[:2])
    return (weights / weights.sum(dim=1, keepdim=True)).to(encoded)


def weighted_poses(weights, references, poses, refine_orientation):
    """Poses of weighted references: weights N x k, references N x k x 7, poses N x 7, whose orientation stays for
    refine_orientation None; 'affine' takes the normalised sum of the quaternions (on the side of the first), 'eigen' the
    weighted mean rotation. Returns N x 7."""
    positions = torch.einsum("nk,nkd->nd", weights, references[:, :, :3])
    quaternions = references[:, :, 3:]
    if refine_orientation is None:
        orientations = poses[:, 3:]
    elif refine_orientation == "affine":
        orientations = F.normalize(torch.einsum("nk,nkd->nd", weights, on_side_of(quaternions, quaternions[:, :1])), dim=1)
    else:
        orientations = mean_quaternion(quaternions, weights)
    return torch.cat((positions, orientations), dim=1)
