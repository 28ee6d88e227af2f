"""Train or test a camera pose auto-encoder (PAE) for a multi-scene APR.

The experiment is that of main_learn_pose_encoding.py; the PAE also encodes the scene, the APR's own most likely one.
"""
from main_learn_pose_encoding import main
from models import MULTI_SCENE_APRS
from util import cli

if __name__ == "__main__":
    cli.run(lambda: main(__doc__, MULTI_SCENE_APRS))
