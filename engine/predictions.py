"""The file of predictions, for networks of PyTorch and for ONNX files. Does not load PyTorch."""
import logging

import numpy as np

from datasets.labels import EXPECTED_COLUMNS, POSE_COLUMNS, write_labels


def with_predictions(table, results, scene_names, max_novelty=None):
    """A table of N images with the columns of their predictions added.

    results: arrays, 'pose' N x 7 in the labels' coordinates with unit quaternions (float64); where there are any
    'apr_pose' (the same of the APR alone), 'scene' and 'scene_probability', N each, and what `add_columns` takes.
    scene_names: the model's, in order, or None.
    """
    predictions = table.copy()
    predictions[POSE_COLUMNS] = results["pose"]
    if "apr_pose" in results:
        predictions[[f"apr_{column}" for column in POSE_COLUMNS]] = results["apr_pose"]
    if "scene" in results:
        predictions["predicted_scene"] = [scene_name(scene, scene_names) for scene in results["scene"]]
        predictions["scene_probability"] = results["scene_probability"]
    add_columns(max_novelty, predictions, results)
    return predictions


def write_predictions(path, predictions, milliseconds):
    """Write a table of `with_predictions` as a CSV, and log its scenes, an image's mean time alone, and its number."""
    if "predicted_scene" in predictions:
        counts = predictions["predicted_scene"].value_counts()
        logging.info("Scenes: %s", ", ".join(f"{name} {n}" for name, n in counts.items()))
    logging.info("Mean inference time:{:.2f}[ms]".format(np.mean(milliseconds)))
    write_labels(path, predictions)
    logging.info("Predictions: %d poses of %d images in %s", predictions["t1"].notna().sum(), len(predictions), path)


def add_columns(max_novelty, predictions, results):
    """Add novelty and expected errors, where there are any, to a table of predictions. Reject what is too novel.

    A frame whose novelty is above max_novelty, unless that is None, keeps its row, with an empty pose.
    results: 'novelty', N, and 'expected_errors', N x 2.
    """
    if "novelty" not in results:
        return
    predictions["novelty"] = np.asarray(results["novelty"])
    if "expected_errors" in results:
        predictions[EXPECTED_COLUMNS] = np.asarray(results["expected_errors"])
    if max_novelty is not None:
        predictions["rejected"] = ~(predictions["novelty"] <= max_novelty)  # NaN, too
        predictions.loc[predictions["rejected"], POSE_COLUMNS] = np.nan
        logging.info("Rejected: %d of %d frames, whose novelty is above %g; they have no pose in the predictions",
                     predictions["rejected"].sum(), len(predictions), max_novelty)


def scene_name(index, scene_names):
    """The name of a scene where the names are known, else its index as text."""
    return scene_names[index] if scene_names and index < len(scene_names) else str(index)
