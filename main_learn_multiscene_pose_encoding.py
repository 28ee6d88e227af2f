"""Train or test a camera pose auto-encoder (PAE) for a multi-scene APR.

The experiment is that of main_learn_pose_encoding.py; the PAE also encodes the scene, the APR's own most likely one.
"""
from engine.run import run_main
from main_learn_pose_encoding import main
from models import MULTI_SCENE_APRS

if __name__ == "__main__":
    run_main(lambda: main(__doc__, MULTI_SCENE_APRS))
