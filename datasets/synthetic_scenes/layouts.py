"""Rendered scenes as files, in the layouts of the official datasets."""
import os

import numpy as np
from PIL import Image
from tqdm import tqdm
from transforms3d.quaternions import mat2quat

from datasets.synthetic_scenes.paths import TRAIN_SEQUENCES, train_and_test_paths
from datasets.synthetic_scenes.render import render


def write_scene(folder, scene, layout, n_frames, width, random):
    """Render a scene into a folder in the layout of a dataset: '7Scenes' or 'cambridge'.

    n_frames: per sequence. width: pixels; the height is 3/4 of it. Returns the median distance in metres of a test
    frame from the nearest training position.
    """
    paths, distance = train_and_test_paths(scene, n_frames, random)
    frames = []  # (split, number of the sequence, name of the image, position, rotation)
    for i, path in enumerate(paths, start=1):
        for j, pose in enumerate(zip(*path, strict=True)):
            name = f"seq-{i:02d}/frame-{j:06d}.color.png" if layout == "7Scenes" else f"seq{i}/frame{j + 1:05d}.png"
            frames.append(("train" if i <= TRAIN_SEQUENCES else "test", i, name, *pose))
    for _, _, name, position, rotation in tqdm(frames, desc=os.path.basename(folder), unit="frame", disable=None):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        image = Image.fromarray(render(scene.faces, position, rotation, width, width * 3 // 4))
        image.save(os.path.join(folder, name), compress_level=1)
    (_write_7scenes_poses if layout == "7Scenes" else _write_cambridge_poses)(folder, frames)
    return distance


def _write_7scenes_poses(folder, frames):
    """Write camera-to-world matrices beside the images, and TrainSplit.txt and TestSplit.txt."""
    for _, _, name, position, rotation in frames:
        pose = np.block([[rotation, position[:, None]], [np.zeros(3), 1]])
        np.savetxt(os.path.join(folder, name.replace(".color.png", ".pose.txt")), pose, fmt="%.9e", delimiter="\t")
    for split in ("train", "test"):
        lines = dict.fromkeys(f"sequence{i}\n" for frame_split, i, *_ in frames if frame_split == split)
        with open(os.path.join(folder, f"{split.capitalize()}Split.txt"), "w") as file:
            file.writelines(lines)


def _write_cambridge_poses(folder, frames):
    """Write dataset_train.txt and dataset_test.txt: per line an image, its position, its world-to-camera quaternion."""
    for split in ("train", "test"):
        with open(os.path.join(folder, f"dataset_{split}.txt"), "w") as file:
            file.write("Synthetic scene\nImageFile, Camera Position [X Y Z W P Q R]\n\n")
            for frame_split, _, name, position, rotation in frames:
                if frame_split == split:
                    pose = (*position, *mat2quat(rotation.T))
                    file.write(" ".join([name, *(f"{number:.9f}" for number in pose)]) + "\n")
