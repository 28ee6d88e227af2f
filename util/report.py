"""What a test tells: log lines, scenes and the file of predictions."""
import logging
import re

import numpy as np
import pandas as pd
import torch

from datasets.labels import POSE_COLUMNS, write_labels
from models import SINGLE_SCENE_APRS
from models.checkpoints import read_about
from util.config import check_scene_names
from util.metrics import changes, medians, pose_err
from util.plots import draw_test
from util.rotations import unit_poses

LEAKED = "the references held the answers"
RECALL_THRESHOLDS = ((0.1, 1), (0.25, 2), (0.5, 5), (5, 10))  # metres, degrees


def scene_names_of(model_name, config, checkpoint_path):
    """A multi-scene model's scenes in order: those that --set gives, else those of the JSON beside its weights, else the
    config's, else None; always None for a single-scene model. Raises UserError for names in the JSON that cannot be its
    scenes."""
    if model_name in SINGLE_SCENE_APRS:
        return None
    given = config.get("scene_names")
    names = read_about(checkpoint_path).get("scene_names") if checkpoint_path else None
    if names is None:
        return given
    check_scene_names(f"the JSON beside {checkpoint_path}", names, config["num_scenes"])
    taken = given if "scene_names" in config.given else names
    if given not in (None, names):
        logging.info("Scenes: %s, as %s; not %s, as %s", ", ".join(taken), *(
            ("--set says", ", ".join(names), f"the JSON beside {checkpoint_path}") if taken is given else
            (f"the JSON beside {checkpoint_path} says", ", ".join(given), "the preset or the config")))
    return taken


def report(run, tested, dataset, results, scene_names=None, leaked=False):
    """Log a test, write its predictions where --predictions_path asks for them, and its pictures.

    tested: what is tested, a file's name.
    results: of engine.evaluate: 'pose' N x 7, 'milliseconds' N, 'milliseconds_alone' M; for multi-scene models 'scene', N
        predicted indices; and where the test is of what leans on an APR, 'apr_pose' N x 7, whose medians are logged above
        the others.
    scene_names: the model's scenes in order, as scene_names_of gives them; where they are None, the label file's are
        taken if it has as many as the model.
    leaked: whether reference poses held the answers, which every line of a result then says.
    """
    truth = dataset.truth
    results = {**results, **{key: to_world(results[key], dataset.origin) for key in ("pose", "apr_pose") if key in results}}
    poses = results["pose"]
    errors, before = [e.numpy() for e in pose_err(poses, truth)], None
    log_results(tested, dataset.labels_file, poses, truth, results, leaked)
    predictions = dataset.labels.copy()
    predictions[POSE_COLUMNS] = unit_poses(poses).numpy()
    if "apr_pose" in results:
        apr_poses = unit_poses(results["apr_pose"])
        predictions[[f"apr_{column}" for column in POSE_COLUMNS]] = apr_poses.numpy()
        before = [e.numpy() for e in pose_err(apr_poses, truth)]
    predictions["position_error_m"], predictions["orientation_error_deg"] = errors
    if "scene" in results:
        scenes = results["scene"].numpy()
        if scene_names is None and len(dataset.scene_names) == run.config["num_scenes"]:
            scene_names = dataset.scene_names
        true_scenes = dataset.scenes if scene_names else np.full(len(scenes), -1)
        log_scenes(poses, truth, scenes, true_scenes, dataset.labels["scene"].to_numpy(), scene_names)
        predictions["predicted_scene"] = [scene_name(scene, scene_names) for scene in scenes]
    if run.args.predictions_path:
        write_labels(run.args.predictions_path, predictions)
        logging.info("Predictions: %s", run.args.predictions_path)
    caption = re.sub(r"\S*/", "", f"{tested} on {dataset.labels_file}") + (f": {LEAKED}" if leaked else "")  # without folders
    pictures = draw_test(run.prefix, dataset.labels, truth.numpy(), poses.numpy(), errors, dataset.frame, caption, before)
    logging.info("Pictures: %s", ", ".join(pictures))


def to_world(poses, origin):
    """Poses in the labels' coordinates, float64, of poses relative to an origin, 3 numbers or None: N x 7 -> N x 7."""
    poses = poses.double()
    return poses if origin is None else torch.cat((poses[:, :3] + origin.to(poses.device), poses[:, 3:]), dim=1)


def report_images(run, names, results, scene_names=None, origin=None):
    """Write the poses of images without truth, and log how long they took. names: N, the images' paths; results, scene_names:
    as `report` takes them, with 'readable', N, for those that have a pose, and 'scene_log_distr', N x num_scenes, for
    multi-scene models; origin: the APR's."""
    readable = results["readable"]
    names = [name for name, is_readable in zip(names, readable.tolist()) if is_readable]
    results = {key: value[readable] for key, value in results.items() if key != "milliseconds_alone"} | {
        "milliseconds_alone": results["milliseconds_alone"]}
    predictions = pd.DataFrame({"img_path": names})
    predictions[POSE_COLUMNS] = unit_poses(to_world(results["pose"], origin)).numpy()
    if "scene" in results:
        predictions["predicted_scene"] = [scene_name(scene, scene_names) for scene in results["scene"].numpy()]
        predictions["scene_probability"] = results["scene_log_distr"].exp().max(dim=1).values.numpy()
        logging.info("Scenes: %s", ", ".join(f"{name} {n}" for name, n in predictions["predicted_scene"].value_counts().items()))
    logging.info("Mean inference time:{:.2f}[ms]".format(results["milliseconds_alone"].mean()))
    write_labels(run.args.predictions_path, predictions)
    logging.info("Predictions: %d poses in %s", len(names), run.args.predictions_path)


def log_results(tested, labels_file, est_pose, gt_pose, results, leaked=False):
    """Log a test as the published scripts do (a line a frame, the medians, the mean inference time), then the mean, the
    90th percentile and the recalls. Poses N x 7 on the CPU; results, leaked: as `report` takes them."""
    suffix = f" ({LEAKED})" if leaked else ""
    position, orientation = (errors.numpy() for errors in pose_err(est_pose, gt_pose))
    for frame in zip(position, orientation, results["milliseconds"].numpy()):
        logging.info("Pose error: {:.3f}[m], {:.3f}[deg], inferred in {:.2f}[ms]".format(*frame))
    logging.info("Performance of %s on %s", tested, labels_file)
    if "apr_pose" in results:
        logging.info("The APR's own median: %s", medians(results["apr_pose"], gt_pose))
        before = [errors.numpy() for errors in pose_err(results["apr_pose"], gt_pose)]
        for name, (change, low, high) in zip(("position", "orientation"), changes(before, (position, orientation))):
            interval = f"95% interval {low:+.1f}% to {high:+.1f}%" if np.isfinite(low) else "too few frames for an interval"
            logging.info("Change of the median %s error: %+.1f%% (%s)%s", name, change, interval, suffix)
    logging.info("Median pose error: %s%s", medians(est_pose, gt_pose), suffix)
    logging.info("Mean inference time:{:.2f}[ms]".format(results["milliseconds_alone"].mean()))
    logging.info("Mean pose error: {:.3f}[m], {:.3f}[deg]{}".format(position.mean(), orientation.mean(), suffix))
    logging.info("90th percentile: {:.3f}[m], {:.3f}[deg]{}".format(
        *(np.percentile(e, 90) for e in (position, orientation)), suffix))
    for metres, degrees in RECALL_THRESHOLDS:
        recall = np.mean((position <= metres) & (orientation <= degrees))
        logging.info("Recall at {} m/{} deg: {:.1f}%{}".format(metres, degrees, 100 * recall, suffix))


def log_scenes(est_pose, gt_pose, predicted_scene, true_scene, scenes, scene_names):
    """Log the scene accuracy and a row a scene. predicted_scene, true_scene: N indices, true_scene -1 where the name is
    unknown to the model; scenes: N names of the label file; scene_names: the model's, in order, or None."""
    known = true_scene >= 0
    if known.any():
        logging.info("Scene accuracy: {:.1f}%".format(100 * np.mean(predicted_scene[known] == true_scene[known])))
    for scene in sorted(set(scenes)):
        rows = np.flatnonzero(scenes == scene)
        index = true_scene[rows[0]]
        counts = np.bincount(predicted_scene[rows])
        predicted = ", ".join(f"{scene_name(i, scene_names)} {100 * counts[i] / len(rows):.1f}%"
                              for i in np.argsort(-counts, kind="stable") if counts[i])
        logging.info("Scene %s%s: %d frames, median %s, predicted as %s", scene, f" (index {index})" if index >= 0 else "",
                     len(rows), medians(est_pose[rows], gt_pose[rows]), predicted)


def scene_name(index, scene_names):
    """The name of a scene where the names are known, else its index as text."""
    return scene_names[index] if scene_names and index < len(scene_names) else str(index)
