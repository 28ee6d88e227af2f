"""Which poses to believe: the novelty of frames, in tests and predictions."""
import logging

import numpy as np
import torch

from engine.evaluation import milliseconds, threads
from models.latent_memory import MIN_FRAMES
from models.refinement import queries_of
from util.errors import UserError
from util.metrics import ause, ause_of_chance, format_medians
from util.rotations import unit_poses

RESULTS = ("novelty", "expected_errors")  # the keys of `novelty_of`
TRUSTED = (0.5, 0.75, 0.9)  # shares of frames, the least novel ones


def novelty_of(run, encoder, encoder_path, results, corrected=False):
    """Results of `evaluate` with the frames' novelty, and the errors to expect, where the PAE can tell.

    encoder: the PAE. encoder_path: its file, for messages.
    results: of the APR, as `models.infer` returns them, N frames.
    corrected: whether the poses to report are those that kernel corrects, or the APR's; None for other poses, which
        have no expected errors.

    Returns {'novelty': N, 'expected_errors': N x 2}, each where there is one. Logs why not, and what it takes.
    """
    memory = encoder.memory
    if not len(memory):
        logging.info("No novelty: %s", forgotten(encoder_path))
        return {}
    queries = {key: value.to(run.device) for key, value in queries_of(results).items()}
    with threads(1):
        memory.novelty(encoder, {key: value[:1] for key, value in queries.items()})  # warm up
        elapsed_ms, novelty = milliseconds(lambda: memory.novelty(encoder, queries), run.device)
    logging.info("Novelty: {:.3f} ms a frame, {:.1f}% of the APR's time".format(
        elapsed_ms / len(novelty), 100 * elapsed_ms / results["milliseconds"].sum()))
    found = {"novelty": novelty.cpu()}
    if len(memory.calibration) and corrected is not None:
        found["expected_errors"] = memory.expected_errors(novelty)[:, 2:] if corrected else (
            memory.expected_errors(novelty)[:, :2])
    return found


def forgotten(encoder_path):
    """That a PAE remembers no training frames, and what to do, in words."""
    return (f"{encoder_path} remembers no training frames: a published PAE does not, nor does one of fewer than "
            f"{MIN_FRAMES} per scene; train the PAE anew on more, or complete it with main_refine_apr.py optimize "
            "--fit_noise")


def warn_of_few_frames(scenes, scene_names=None):
    """Warn of scenes that a PAE will not remember, for they have too few training frames. scenes: N indices."""
    few = [f"{scene_names[scene] if scene_names else f'scene {scene}'} ({n})"
           for scene, n in zip(*(part.tolist() for part in torch.unique(scenes, return_counts=True))) if n < MIN_FRAMES]
    if few:
        logging.warning("Too few training frames, fewer than %d, in %s: the PAE will remember none of them, so there "
                        "is no novelty, and kernel corrects no pose", MIN_FRAMES, ", ".join(few))


def corrected(run, encoder, encoder_path, results):
    """Results of `evaluate` with poses that the PAE's memory corrects, 'apr_pose', the APR's own, and novelty.

    run, encoder, encoder_path, results: as for `novelty_of`. Logs how many poses change.
    """
    novelty = novelty_of(run, encoder, encoder_path, results, corrected=True)
    if not novelty:
        return results
    queries = {key: value.to(run.device) for key, value in queries_of(results).items()}
    poses, _ = encoder.memory.corrected(encoder, queries)
    changed = (poses != unit_poses(queries["pose"])).any(dim=1)
    logging.info("Refined by %s: %d of %d poses", encoder_path, changed.sum(), len(changed))
    return {**results, "apr_pose": results["pose"], "pose": poses.cpu(), **novelty}


def check_max_novelty(run, encoder, encoder_path):
    """Raise UserError for --max_novelty with a PAE that cannot tell novelty, or with none (None)."""
    if run.max_novelty is not None and not (encoder and len(encoder.memory)):
        problem = forgotten(encoder_path) if encoder else f"{encoder_path} does not exist; give the APR's PAE"
        raise UserError(f"--max_novelty needs novelty: {problem}")


def log_novelty(errors, novelty, expected=None, note=""):
    """Log how well novelty tells large errors from small ones, and how well expected errors agree with the true ones.

    errors: (N metres, N degrees). novelty: N. expected: N x 2, or None. Arrays. Frames without novelty are left out.
    note: a warning that is appended to every line of a result.
    """
    note = f" ({note})" if note else ""
    known = np.isfinite((novelty, *errors)).all(axis=0)
    if known.sum() < 10:
        logging.info("Novelty: of %d frames only, too few for statistics", known.sum())
        return
    errors, novelty = [error[known] for error in errors], novelty[known]
    logging.info("Novelty: median {:.2f} (a training frame's is 1), 90th percentile {:.2f}{}".format(
        *np.quantile(novelty, (0.5, 0.9)), "" if known.all() else f"; {(~known).sum()} frames have none"))
    logging.info("Novelty: rank correlation {:.2f} with the position error, {:.2f} with the orientation error".format(
        *(_rank_correlation(novelty, error) for error in errors)))
    logging.info("Novelty: AUSE {:.3f} (position), {:.3f} (orientation); 0 is the oracle, chance {:.3f} and {:.3f}"
                 .format(*(ause(error, novelty) for error in errors), *map(ause_of_chance, errors)))
    order = np.argsort(novelty, kind="stable")
    for share in TRUSTED:
        trusted = order[:max(1, round(share * len(order)))]
        logging.info("Median pose error of the %.0f%% most trusted frames: %s%s", 100 * share,
                     format_medians(np.median(error[trusted]) for error in errors), note)
    if expected is not None:
        for k, (name, unit) in enumerate((("position", "m"), ("orientation", "deg"))):
            fifths = np.array_split(np.argsort(expected[known, k], kind="stable"), 5)
            pairs = ", ".join(f"{expected[known, k][fifth].mean():.3g} {errors[k][fifth].mean():.3g}"
                              for fifth in fifths)
            logging.info("Expected and true %s error [%s], means by fifths: %s%s", name, unit, pairs, note)


def _rank_correlation(a, b):
    from scipy.stats import spearmanr  # here, since it takes half a second

    return spearmanr(a, b)[0] if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")
