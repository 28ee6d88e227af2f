"""A trained APR as one ONNX file: from frames, or from the networks' input, to poses."""
import json
import logging
import tomllib
import warnings
from pathlib import Path

import torch
from torch import nn

from datasets import transforms
from datasets.official import CONVENTIONS
from engine.onnx_preprocessing import preprocessing
from engine.report import convention_of
from models import infer
from models.checkpoints import read_about
from models.refinement import queries_of
from util.files import sha256, whole_file
from util.rotations import unit_poses

OPSET = 18
PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


class Estimator(nn.Module):
    """An APR, and its PAE's novelty, as an ONNX file computes them. forward(N x 3 x H x W) -> its outputs."""

    def __init__(self, apr, encoder=None):
        """apr, encoder: frozen. Without a memory the encoder adds nothing."""
        super().__init__()
        self.apr, self.encoder = apr, encoder if encoder is not None and len(encoder.memory) else None
        self.apr.precision = "fp32"

    def results(self, img):
        """The outputs, by name, of normalised images. With an origin, positions are float64."""
        output = infer(self.apr, img)
        pose = unit_poses(output["pose"])
        position, origin = pose[:, :3], self.apr.origin
        results = {"position": position if origin is None else position.double() + origin, "quaternion": pose[:, 3:]}
        if "scene" in output:
            results["scene"] = output["scene"]
            results["scene_probability"] = output["scene_log_distr"].exp().amax(dim=1)
        if self.encoder is not None:
            results["novelty"] = self.encoder.memory.traceable_novelty(self.encoder, queries_of(output))
        return results

    def forward(self, img):
        """The values of `results`."""
        return tuple(self.results(img).values())


def export_network(estimator):
    """An `Estimator` as an ONNX model from 'normalised', N x 3 x 224 x 224, to its results."""
    example = torch.zeros(2, 3, transforms.SIZE, transforms.SIZE)
    with torch.no_grad():
        names = list(estimator.eval().results(example))
    loud = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.onnx.export(
                estimator, (example,), dynamo=True, verbose=False, opset_version=OPSET, input_names=["normalised"],
                output_names=names, dynamic_shapes=({0: torch.export.Dim("N")},))
    finally:
        for logger, level in zip(loud, levels):
            logger.setLevel(level)
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info,
                 *model.graph.initializer):  # where each of them comes from, with paths of this machine
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def with_preprocessing(network):
    """A model of `export_network` that takes 'frames' instead, N x H x W x 3 uint8, under the test transform."""
    import onnx

    frames = onnx.compose.add_prefix(preprocessing(network.ir_version, OPSET), "frames/", rename_inputs=False)
    return onnx.compose.merge_models(frames, network, [("frames/normalised", "normalised")])


def describe_weights(args, scene_names, unit):
    """What is kept in the file beside the network: {key: text}.

    args: model_name, checkpoint_path, encoder_checkpoint_path, input and quantize, as on the command line.
    """
    about = read_about(args.checkpoint_path)
    convention, trained_on = convention_of(about, scene_names), about.get("labels_file")
    meaning = "camera-to-world or world-to-camera, as in the labels of the training" + (
        f" ({trained_on})" if isinstance(trained_on, str) else "")
    if convention is not None:
        meaning = "camera-to-world" if CONVENTIONS[convention] else "world-to-camera"
    described = {
        "project": "camera-pose-regression",
        "version": tomllib.loads(PROJECT.read_text())["project"]["version"],
        "model": args.model_name, "input": args.input, "precision": args.quantize or "fp32", "unit": unit,
        "convention": f"quaternions are scalar first, {meaning}",
        "scene_names": json.dumps(scene_names),
        "weights_sha256": sha256(args.checkpoint_path),
    }
    if args.encoder_checkpoint_path:
        described["encoder_sha256"] = sha256(args.encoder_checkpoint_path)
    return described


def write_model(path, model, described):
    """Check an ONNX model and write it with its metadata as one file, completely or not at all."""
    import onnx

    onnx.helper.set_model_props(model, described)
    model.producer_name, model.producer_version = described["project"], described["version"]
    onnx.checker.check_model(model, full_check=True)
    with whole_file(path, "wb") as file:
        file.write(model.SerializeToString())
    logging.info("Exported: %s, %.1f MB, %s -> %s", path, Path(path).stat().st_size / 1e6, model.graph.input[0].name,
                 ", ".join(output.name for output in model.graph.output))
