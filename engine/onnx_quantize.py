"""Static int8 quantisation of an exported network, calibrated on frames, and what it costs."""
import logging
import os
import tempfile

import numpy as np
import torch

from datasets.camera_poses import CameraPoseDataset
from engine.evaluation import test_loader, to_device
from engine.onnx_file import estimate, poses_of, session_of
from util.files import writing
from util.metrics import format_medians, pose_err
from util.progress import progress

N_CALIBRATION = 64  # frames at most, evenly spaced among the labels'


def quantised(run, network, dataset_path, scene_names):
    """An ONNX model of `export_network` in int8, calibrated on frames of run.labels_file.

    Convolutions and products of matrices are quantised, the heads are not. Logs the median errors of both models on all
    frames. scene_names: the model's, or None. Raises UserError for frames that cannot be read.
    """
    dataset = CameraPoseDataset(dataset_path, run.labels_file, scene_names=scene_names)
    with dataset.report_all_unreadable():
        int8 = quantise(network, dataset)
        for name, model in (("fp32", network), ("int8", int8)):
            errors = errors_of(run, model, dataset)
            logging.info("Median pose error in %s: %s", name, format_medians(np.median(e) for e in errors))
    return int8


def quantise(network, dataset):
    """An ONNX model of `export_network` in int8, calibrated on up to N_CALIBRATION frames of a dataset."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Frames(CalibrationDataReader):
        """Normalised frames, one at a time."""

        def __init__(self):
            chosen = np.unique(np.linspace(0, len(dataset) - 1, min(N_CALIBRATION, len(dataset))).round().astype(int))
            logging.info("Calibrating int8 on %d of %d frames", len(chosen), len(dataset))
            self.frames = iter(progress(chosen.tolist(), desc="calibration", unit="frame"))

        def get_next(self):
            """The next input, or None after the last."""
            i = next(self.frames, None)
            if i is None:
                return None
            item = {"img": dataset[i]["img"].unsqueeze(0)}
            return {"normalised": to_device(item, torch.device("cpu"))["img"].contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder, writing(folder):
        whole, prepared, result = (os.path.join(folder, name) for name in ("fp32.onnx", "ready.onnx", "int8.onnx"))
        onnx.save(network, whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, result, Frames(), op_types_to_quantize=["Conv", "MatMul"], per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return onnx.load(result)


def errors_of(run, model, dataset):
    """The errors of an ONNX model on a CameraPoseDataset: N metres, N degrees (arrays)."""
    session, poses = session_of(model.SerializeToString()), []
    for batch in progress(test_loader(run, dataset), desc="test", unit="batch"):
        poses.append(poses_of(estimate(session, to_device(batch, torch.device("cpu"))["img"].contiguous().numpy())))
    return [error.numpy() for error in pose_err(torch.from_numpy(np.concatenate(poses)), dataset.truth)]
