"""What a test reports: log lines, the errors of each scene, the file of predictions, and pictures."""
import logging
import re

import numpy as np
import pandas as pd
import torch

from datasets.descriptions import read_convention
from datasets.labels import POSE_COLUMNS, write_labels
from datasets.official import CONVENTIONS, convention_of_scenes
from engine.novelty import RESULTS, log_novelty
from engine.plots import draw_test
from engine.prediction_plot import draw_predictions
from engine.predictions import add_columns, scene_name, with_predictions, write_predictions
from models import SINGLE_SCENE_APRS
from models.checkpoints import read_about
from util.config import check_scene_names
from util.log import DETAIL
from util.metrics import changes, format_medians, pose_err
from util.rotations import unit_poses

LEAKED = "the references held the answers"
N_POSES = 100  # of a training, that are kept beside the weights
RECALL_THRESHOLDS = ((0.05, 5), (0.1, 1), (0.25, 2), (0.5, 5), (5, 10))  # metres, degrees


def scene_names_of(model_name, config, checkpoint_path):
    """A multi-scene model's scenes in order; None where they are unknown, and for a single-scene model.

    They are those of --set scene_names, else of the JSON beside the weights, else of the config. Raises UserError for
    names in the JSON that cannot be the model's scenes.
    """
    if model_name in SINGLE_SCENE_APRS:
        return None
    in_config = config["scene_names"]
    in_json = read_about(checkpoint_path).get("scene_names") if checkpoint_path else None
    if in_json is None:
        return in_config
    check_scene_names(f"the JSON beside {checkpoint_path}", in_json, config["num_scenes"])
    if in_config in (None, in_json):
        return in_json
    json_file = f"the JSON beside {checkpoint_path}"
    if "scene_names" in config.given:
        names, source, others, other_source = in_config, "--set says", in_json, json_file
    else:
        names, source, others, other_source = in_json, f"{json_file} says", in_config, "the preset or the config"
    logging.info("Scenes: %s, as %s; not %s, as %s", ", ".join(names), source, ", ".join(others), other_source)
    return names


def convention_of(about_weights, scene_names):
    """The convention of an APR's quaternions, of official.CONVENTIONS, or None where it is unknown.

    about_weights: the JSON beside its weights. Where that does not say it, the papers' scenes are known by name.
    """
    convention, names = about_weights.get("convention"), scene_names or about_weights.get("scene_names")
    known = isinstance(convention, str) and convention in CONVENTIONS
    return convention if known else convention_of_scenes(names if isinstance(names, list) else ())


def report(run, tested, dataset, results, scene_names=None, leaked=False):
    """Log a test, write its predictions where --predictions_path asks for them, and draw its pictures.

    tested: a file's name, or in words what is tested.
    results: of `evaluate`: 'pose' N x 7, 'milliseconds' N, 'milliseconds_alone' M; for multi-scene models 'scene', N
        predicted indices; for tests of a PAE or a refinement 'apr_pose' N x 7, the APR's own; with a PAE what
        `novelty_of` returns.
    scene_names: as `scene_names_of` returns them. Where they are None, the label file's are taken if there are as many
        as the model has.
    leaked: whether reference poses held the answers; every line of a result then says so.
    """
    poses, errors = _poses_and_errors(results["pose"], dataset)
    predictions = dataset.labels.copy()
    predictions[POSE_COLUMNS] = unit_poses(poses).numpy()
    apr_errors = None
    if "apr_pose" in results:
        apr_poses, apr_errors = _poses_and_errors(results["apr_pose"], dataset)
        predictions[[f"apr_{column}" for column in POSE_COLUMNS]] = unit_poses(apr_poses).numpy()
    predictions["position_error_m"], predictions["orientation_error_deg"] = errors

    log_errors(tested, dataset.labels_file, errors, apr_errors, results, LEAKED if leaked else "")
    if "scene" in results:
        scenes = results["scene"].numpy()
        if scene_names is None and len(dataset.scene_names) == run.config["num_scenes"]:
            scene_names = dataset.scene_names
        true_scenes = dataset.scenes if scene_names else np.full(len(scenes), -1)
        log_scenes(errors, scenes, true_scenes, dataset.labels["scene"].to_numpy(), scene_names)
        predictions["predicted_scene"] = [scene_name(scene, scene_names) for scene in scenes]
    novelty, expected = (results[key].numpy() if key in results else None for key in RESULTS)
    if novelty is not None:
        log_novelty(errors, novelty, expected, LEAKED if leaked else "")
    add_columns(run.max_novelty, predictions, results)
    if run.predictions_path:
        write_labels(run.predictions_path, predictions)
        logging.info("Predictions: %s", run.predictions_path)
    caption = re.sub(r"\S*/", "", f"{tested} on {dataset.labels_file}")  # without folders
    if leaked:
        caption += f": {LEAKED}"
    pictures = draw_test(run.prefix, dataset.labels, dataset.truth.numpy(), poses.numpy(), errors, dataset.frame,
                         caption, apr_errors, novelty,
                         read_convention(dataset.labels_file, dataset.labels["scene"]))
    logging.info("Pictures: %s", ", ".join(pictures))


def _poses_and_errors(poses, dataset):
    """Poses in the labels' coordinates, and their errors: N metres, N degrees (arrays)."""
    poses = to_world(poses, dataset.origin)
    return poses, [errors.numpy() for errors in pose_err(poses, dataset.truth)]


def to_world(poses, origin):
    """Poses in the labels' coordinates (float64) from poses relative to an origin, 3 numbers or None: N x 7 each."""
    poses = poses.double()
    return poses if origin is None else torch.cat((poses[:, :3] + origin.to(poses.device), poses[:, 3:]), dim=1)


def training_poses(dataset):
    """Up to N_POSES of a dataset's poses, evenly spaced, for the JSON beside weights: a list of [scene, 7 numbers]."""
    chosen = np.unique(np.linspace(0, len(dataset.labels) - 1, N_POSES).round().astype(int))
    return [[scene, *(round(number, 4) for number in pose)] for scene, pose in zip(
        dataset.labels["scene"].iloc[chosen], dataset.truth[chosen].tolist(), strict=True)]


def read_training_poses(about_weights, encoder, origin):
    """Poses that an APR was trained on: M x 7, in the labels' coordinates (array).

    They are those of the JSON beside its weights, as `training_poses` made them; without any, those that its PAE
    remembers. encoder: the PAE, or None. origin: the APR's.
    """
    kept = about_weights.get("training_poses")
    if kept:
        return np.array([pose[1:] for pose in kept], float).reshape(-1, 7)
    return np.zeros((0, 7)) if encoder is None else to_world(encoder.memory.poses, origin).cpu().numpy()


def report_images(run, images, results, scene_names, origin, trained_on, convention=None):
    """Write the predicted poses of images without labels, draw them, and log how long they took.

    images: their `names`, N, and `times`, N seconds or None. results: as for `image_table`, and 'readable', N, says
    which images have a pose. trained_on: poses that the APR was trained on, M x 7, perhaps none. convention: as for
    draw_predictions.
    """
    readable = results["readable"]
    table = pd.DataFrame({"img_path": images.names})
    if images.times is not None:
        table["time_s"] = images.times
    of_images = {key: rows[readable] for key, rows in results.items() if key != "milliseconds_alone"}
    predictions = image_table(run, table[readable.numpy()].reset_index(drop=True), of_images, scene_names, origin)
    write_predictions(run.predictions_path, predictions, results["milliseconds_alone"].numpy())
    if convention is None:
        logging.info("The picture has no viewing directions: nothing says whose convention the quaternions have, as "
                     "{\"convention\": \"7Scenes\"} would in a JSON beside the weights, of their name")
    logging.info("Picture: %s", draw_predictions(f"{run.prefix}_predicted.png", trained_on,
                                                 predictions[POSE_COLUMNS].to_numpy(), predictions.get("novelty"),
                                                 convention))


def image_table(run, table, results, scene_names, origin):
    """A table of N images with the columns of their predictions added.

    results, scene_names: as for `report`; for multi-scene models 'scene_log_distr' is N x num_scenes. origin: the
    APR's.
    """
    arrays = {key: unit_poses(to_world(results[key], origin)).numpy() for key in ("pose", "apr_pose")
              if key in results}
    arrays |= {key: results[key].numpy() for key in ("scene", *RESULTS) if key in results}
    if "scene" in results:
        arrays["scene_probability"] = results["scene_log_distr"].exp().max(dim=1).values.numpy()
    return with_predictions(table, arrays, scene_names, run.max_novelty)


def log_errors(tested, labels_file, errors, apr_errors, results, note=""):
    """Log a test: a line per frame, medians and mean inference time as published, then mean, 90th percentile and
    recalls.

    errors: (N metres, N degrees). apr_errors: the same of the APR alone, or None. results: as for `report`. note: a
    warning that is appended to every line of a result.
    """
    note = f" ({note})" if note else ""
    position, orientation = errors
    for frame in zip(position, orientation, results["milliseconds"].numpy()):
        logging.info("Pose error: {:.3f}[m], {:.3f}[deg], inferred in {:.2f}[ms]".format(*frame), extra=DETAIL)
    logging.info("Performance of %s on %s", tested, labels_file)
    if apr_errors is not None:
        logging.info("The APR's own median: %s", format_medians(map(np.median, apr_errors)))
        for name, (change, low, high) in zip(("position", "orientation"), changes(apr_errors, errors)):
            interval = f"95% interval {low:+.1f}% to {high:+.1f}%"
            if not np.isfinite(low):
                interval = "too few frames for an interval"
            logging.info("Change of the median %s error: %+.1f%% (%s)%s", name, change, interval, note)
    logging.info("Median pose error: %s%s", format_medians(map(np.median, errors)), note)
    logging.info("Mean inference time:{:.2f}[ms]".format(results["milliseconds_alone"].mean()))
    logging.info("Mean pose error: {:.3f}[m], {:.3f}[deg]{}".format(position.mean(), orientation.mean(), note))
    logging.info("90th percentile: {:.3f}[m], {:.3f}[deg]{}".format(*(np.percentile(e, 90) for e in errors), note))
    for metres, degrees in RECALL_THRESHOLDS:
        recall = np.mean((position <= metres) & (orientation <= degrees))
        logging.info("Recall at {} m/{} deg: {:.1f}%{}".format(metres, degrees, 100 * recall, note))


def log_scenes(errors, predicted_scene, true_scene, scenes, scene_names):
    """Log the scene accuracy and a line per scene.

    errors: (N metres, N degrees). predicted_scene, true_scene: N indices; true_scene is -1 for a name that the model
    does not know. scenes: N names of the label file. scene_names: the model's, in order, or None.
    """
    known = true_scene >= 0
    if known.any():
        logging.info("Scene accuracy: {:.1f}%".format(100 * np.mean(predicted_scene[known] == true_scene[known])))
    for scene in sorted(set(scenes)):
        rows = np.flatnonzero(scenes == scene)
        index = true_scene[rows[0]]
        counts = np.bincount(predicted_scene[rows])
        predicted = ", ".join(f"{scene_name(i, scene_names)} {100 * counts[i] / len(rows):.1f}%"
                              for i in np.argsort(-counts, kind="stable") if counts[i])
        name = f"{scene} (index {index})" if index >= 0 else scene
        medians = format_medians(np.median(e[rows]) for e in errors)
        logging.info("Scene %s: %d frames, median %s, predicted as %s", name, len(rows), medians, predicted)
