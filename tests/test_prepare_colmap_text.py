"""COLMAP models as text: every way to write images.txt that pycolmap or a person uses, and damaged ones."""
import re

import numpy as np
import pytest
from prepare_layouts import error_of, write_model

from datasets import prepare_colmap

ODD_NAMES = ["walk one/view 0.jpg", "walk one/view  1.jpg", "walk/#2.jpg", "walk/3 4 5 6", "17", "Mühle/18 19 20"]
POINTS = ["1 2 -1 3 4.5 -1 1e2 3 7", "", "1.5 2e-1 -1 ", "1 2 -1 3 4 -1 1 3 -1 7 8 12", "1 0 0 -1 5 -1", ""]


def image_lines(folder):
    """The header of images.txt as text, and its lines of images."""
    lines = (folder / "images.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("#")), [
        line for line in lines if line and not line.startswith("#")]


TEXTS = {
    "as written": lambda head, images: head + "".join(f"{image}\n\n" for image in images),
    "points": lambda head, images: head + "".join(
        f"{image}\n{line}\n" for image, line in zip(images, POINTS, strict=True)),
    "no empty lines": lambda head, images: head + "".join(f"{image}\n" for image in images),
    "points, no empty lines": lambda head, images: head + "".join(
        f"{image}\n{line}\n" if line else f"{image}\n" for image, line in zip(images, POINTS, strict=True)),
    "one line missing": lambda head, images: head + "\n\n".join(images).replace("\n\n", "\n", 1),
    "the last line missing": lambda head, images: head + "\n\n".join(images),
    "Windows": lambda head, images: "\ufeff" + (head + "\n\n".join(images)).replace("\n", "\r\n"),
    "tabs": lambda head, images: head + "".join("\t".join(image.split(" ", 9)) + "\n\n" for image in images),
    "spaces": lambda head, images: head + "".join("  ".join(image.split(" ", 9)) + "  \n  \n" for image in images),
    "comments": lambda head, images: head + "".join(f"{image}\n# a comment\n\n" for image in images),
    "no header": lambda head, images: "".join(f"{image}\n\n" for image in images),
}


@pytest.mark.parametrize("case", TEXTS)
def test_every_image_of_a_text_model_is_read_with_its_whole_name(case, tmp_path):
    poses = write_model(tmp_path / "model", True, ODD_NAMES)
    text = TEXTS[case](*image_lines(tmp_path / "model"))
    (tmp_path / "model/images.txt").write_bytes(text.encode())
    frames = dict(prepare_colmap.read_model(tmp_path / "model"))
    assert set(frames) == set(ODD_NAMES)
    for name in poses:
        np.testing.assert_allclose(frames[name], np.concatenate(poses[name]), atol=1e-12)
    write_model(tmp_path / "binary", False, ODD_NAMES)
    assert dict(prepare_colmap.read_model(tmp_path / "binary")).keys() == frames.keys()


TEXT_MISTAKES = {
    "another number": (lambda text: text.replace("images: 6", "images: 7"),
                       "images.txt: 6 images, but its header says 7"),
    "an id twice": (lambda text: text.replace("\n2 ", "\n1 "),
                    "images.txt: line 7: image id 1 is listed in line 5 already"),
    "no name": (lambda text: text.replace(" walk/#2.jpg", ""), "images.txt: line 9: '3 -0.58"),
    "cut off": (lambda text: text[:text.index("walk/#2") - 60], "images.txt: line 9: '3 -0.58"),
    "cut in the name": (lambda text: text[:text.index("/#2")], "images.txt: 3 images, but its header says 6"),
    "half a point": (lambda text: text.replace("0.jpg\n", "0.jpg\n1.5 2"),
                     "images.txt: line 6: '1.5 2' is neither an image"),
    "half a point, whole numbers": (lambda text: text.replace("0.jpg\n", "0.jpg\n1 2 -1 3 4 -1 5 6 7 8 9"),
                                    "images.txt: line 6: '1 2 -1 3 4 -1 5 6 7 8 9' is neither an image"),
    "points behind an empty line": (lambda text: text.replace("0.jpg\n", "0.jpg\n\n1 2 -1 3 4 -1 5 6 7 8 9 8\n"),
                                    "images.txt: line 7: '1 2 -1 "),
    "nan": (lambda text: re.sub("\n3 [^ ]* ", "\n3 nan ", text), "image walk/#2.jpg has no finite pose"),
    "no rotation": (lambda text: re.sub("\n3( [^ ]*){4} ", "\n3 0 0 0 0 ", text),
                    "image walk/#2.jpg has no finite pose"),
    "a number of Python's": (lambda text: re.sub("\n3 [^ ]* ", "\n3 0_1 ", text), "images.txt: line 9: '3 0_1 "),
    "Latin-1": (lambda text: text.encode("latin-1"), "images.txt: not a text file in UTF-8"),
}


@pytest.mark.parametrize("case", TEXT_MISTAKES)
def test_a_damaged_images_txt_ends_in_one_clear_line(case, tmp_path):
    write_model(tmp_path / "model", True, ODD_NAMES)
    path = tmp_path / "model/images.txt"
    broken = TEXT_MISTAKES[case][0](path.read_text(encoding="utf-8"))
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    assert TEXT_MISTAKES[case][1] in error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("name", ("cameras", "points3D", "frames"))
def test_another_damaged_file_of_a_text_model_ends_in_one_clear_line(name, tmp_path):
    write_model(tmp_path / "model", True)
    path = tmp_path / f"model/{name}.txt"
    path.write_text(path.read_text() + "1 left\n")
    error = error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert f"{tmp_path / 'model'}: not a readable COLMAP model" in error and not (tmp_path / "labels").exists()
