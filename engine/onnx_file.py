"""ONNX files: what an export needs, and running one. Does not load PyTorch."""
import importlib.util
import json
import os

import numpy as np

from datasets.resources import n_cores
from util.errors import UserError


def check_export(args):
    """Raise UserError for arguments of main.py export that do not fit together, and for missing packages."""
    path = args.export_path
    if path is None or not path.endswith(".onnx") or os.path.isdir(path):
        raise UserError(f"export needs --export_path FILE.onnx, the file to write{f', not {path}' if path else ''}")
    if (args.labels_file == "-") == (args.quantize is not None):
        raise UserError("--quantize needs frames to calibrate it: the dataset's folder and a label file" if
                        args.quantize else "export takes - in the places of the dataset and the label file, which "
                        "calibrate --quantize int8 alone")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export needs other packages: pip install {' '.join(missing)}")


def session_of(model, threads=None):
    """An ONNX Runtime session on the CPU: of a file's path, or of a serialised model.

    threads: their number (default: OMP_NUM_THREADS, or as many as there are cores). Raises UserError without the
    package onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("an ONNX file needs the package onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = threads or (int(asked) if asked.isdecimal() and int(asked) else n_cores())
    options.log_severity_level = 3  # errors, which are raised too
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_model(path):
    """The session of a file that main.py exported, and its metadata: {key: text, 'scene_names': list or None}.

    Raises UserError for a file that does not exist, is no ONNX model, or was written by another program.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        session = session_of(path)
    except UserError:
        raise
    except Exception as error:  # whatever the parser raises, the cause is the file
        raise UserError(f"{path}: not a readable ONNX file ({str(error).splitlines()[0][:160]})") from error
    about = session.get_modelmeta().custom_metadata_map
    if about.get("project") != "camera-pose-regression":
        raise UserError(f"{path}: an ONNX file without the metadata of this project; main.py export writes such files")
    return session, {**about, "scene_names": json.loads(about["scene_names"])}


def estimate(session, images):
    """A model's outputs, {name: N x ...}, for its input: N x H x W x 3 uint8, or N x 3 x 224 x 224 float32."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images})))


def poses_of(outputs):
    """The poses among a model's outputs: N x 7, float64, with unit quaternions."""
    quaternions = outputs["quaternion"].astype(float)
    return np.concatenate((outputs["position"], quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)),
                          axis=1)
