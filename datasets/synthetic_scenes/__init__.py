"""Textured 3-D scenes rendered with numpy, with exact poses, in the layouts of the official datasets.

    python -m datasets.synthetic_scenes OUT [--scenes room yard ...] [--layout 7Scenes|cambridge]

A room is a few metres wide and furnished. A yard lies between houses and is tens of metres wide. Scenes consist of
textured rectangles with light and shadows baked in. The world's z axis points up. A camera's axes point right, down and
forward. Its focal length is that of 7Scenes, 585 pixels for images 640 pixels wide, and its principal point is the
middle of the image (the centre of the top left pixel is at 0.5, 0.5).
"""
from datasets.synthetic_scenes.layouts import write_scene
from datasets.synthetic_scenes.paths import camera_path, train_and_test_paths
from datasets.synthetic_scenes.render import camera_rotation, render
from datasets.synthetic_scenes.rooms import make_room, make_yard
from datasets.synthetic_scenes.surfaces import UP, Box, Face, Scene

__all__ = ["UP", "Box", "Face", "Scene", "camera_path", "camera_rotation", "make_room", "make_yard", "render",
           "train_and_test_paths", "write_scene"]
