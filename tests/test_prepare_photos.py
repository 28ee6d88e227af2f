"""Label files from photos: rendered frames of a room without their poses, which COLMAP has to find."""
import json
import shlex
import shutil

import numpy as np
import pytest
from conftest import run_module_here, run_script, write_labels, write_scene
from PIL import ExifTags, Image
from prepare_layouts import call_well, error_of, listing, pose_of, read_rows
from transforms3d.quaternions import mat2quat, quat2mat

from datasets import merge_labels, preparation, prepare_photos
from datasets.descriptions import describe, read_unit
from datasets.synthetic_scenes.paths import camera_path
from datasets.synthetic_scenes.render import render
from datasets.synthetic_scenes.rooms import make_room
from models.latent_memory import MIN_FRAMES
from util.errors import UserError

N, N_OTHER = 44, 14  # photos of the walk, and of another room, which COLMAP cannot join to it
TURNED = range(0, N, 6)  # photos that are stored turned, with a GPS position
GPS_SCALE = 20  # the GPS positions are those of a room so many times as large
LATITUDE, LONGITUDE = 48.0, -11.5


def name_of(i):
    return f"walk one/view {i}.{'jpg' if i in TURNED else 'png'}"  # in natural order: view 10 follows view 9


def gps_of(position):
    """GPS tags of a position in metres, east, north and up of LATITUDE and LONGITUDE."""
    e2, latitude = 0.00669438, np.radians(LATITUDE)  # the ellipsoid's radii of curvature
    north = 6378137 * (1 - e2) / (1 - e2 * np.sin(latitude) ** 2) ** 1.5
    east = 6378137 / np.sqrt(1 - e2 * np.sin(latitude) ** 2)
    degrees = (LATITUDE + np.degrees(position[1] / north),
               LONGITUDE + np.degrees(position[0] / (east * np.cos(latitude))))
    values = [(int(abs(d)), int(abs(d) * 60 % 60), abs(d) * 3600 % 60) for d in degrees]
    return {1: "N", 2: values[0], 3: "W", 4: values[1], 5: b"\0", 6: float(500 + position[2])}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A folder of photos of a walk through a room, with the true poses {name: (position, camera-to-world rotation)}.

    Among them are N_OTHER photos of another room, and two of noise.
    """
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    room = make_room(random)
    truth = {}
    (folder / "walk one").mkdir()
    for i, pose in enumerate(zip(*camera_path(room, N, random), strict=True)):
        truth[name_of(i)] = pose
        image, exif = Image.fromarray(render(room.faces, *pose, 320, 240)), Image.Exif()
        if i in TURNED:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[ExifTags.Base.Orientation] = 6
            exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps_of(GPS_SCALE * pose[0]))
        image.save(folder / name_of(i), quality=98, exif=exif.tobytes())
    (folder / "elsewhere").mkdir()
    random = np.random.default_rng(5)
    room = make_room(random)
    for i, pose in enumerate(zip(*camera_path(room, N_OTHER, random), strict=True)):
        Image.fromarray(render(room.faces, *pose, 320, 240)).save(folder / f"elsewhere/view {i}.png")
    for i in range(2):
        write_noise(folder / f"noise{i}.png", i)
    return folder, truth


@pytest.fixture(scope="module")
def prepared(walk, tmp_path_factory):
    """The folder that the command has written, and what it printed."""
    out = tmp_path_factory.mktemp("homes") / "attic"
    process = run_script("-m", "datasets.prepare_photos", walk[0], out)
    assert process.returncode == 0 and process.stderr == "", process.stdout + process.stderr
    return out, process.stdout


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of that folder without label files, to be scaled."""
    shutil.copytree(prepared[0], tmp_path / "attic", ignore=shutil.ignore_patterns("attic_*"))
    return tmp_path / "attic"


def write_noise(path, seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((320, 240)).save(path)


def labelled(out, scene="attic"):
    """{image: pose} of the label files in a folder."""
    return {row[3]: pose_of(row) for split in ("train", "test") for row in read_rows(out / f"{scene}_{split}.csv")}


def similarity(source, target):
    """Umeyama's (TPAMI 1991): the scale, rotation and translation from points to points, N x 3 each."""
    means = source.mean(axis=0), target.mean(axis=0)
    source, target = source - means[0], target - means[1]
    u, singular, v = np.linalg.svd(target.T @ source)
    signs = np.array([1, 1, np.sign(np.linalg.det(u @ v))])
    rotation = u * signs @ v
    scale = singular @ signs / (source ** 2).sum()
    return scale, rotation, means[1] - scale * rotation @ means[0]


def scale_to(poses, truth):
    """The scale from labels, {image: pose}, to the true positions."""
    return similarity(np.array([pose[:3] for pose in poses.values()]), np.array([truth[name][0] for name in poses]))[0]


def test_photos_are_placed_where_they_were_taken(walk, prepared):
    truth, (out, output) = walk[1], prepared
    assert f"sparse: {N} of {N + N_OTHER + 2} photos placed, mean reprojection error 0." in output
    first = ", ".join(f"elsewhere/view {i}.png" for i in range(5))
    assert f"{N_OTHER + 2} photos not placed, and left out: {first} and {N_OTHER - 3} more" in output
    assert "The photos fall into 2 parts that COLMAP cannot join; the largest is taken, and not the others" in output
    poses = labelled(out)
    assert len(poses) == N - 3 and set(poses) <= set(truth)  # without those between the stretches
    found, exact = np.array([pose[:3] for pose in poses.values()]), np.array([truth[name][0] for name in poses])
    scale, rotation, translation = similarity(found, exact)
    errors = np.linalg.norm(scale * found @ rotation.T + translation - exact, axis=1)
    assert errors.max() < 0.01 * np.linalg.norm(np.ptp(exact, axis=0))
    for name, pose in poses.items():
        true = mat2quat(truth[name][1])
        assert np.degrees(2 * np.arccos(min(1, abs(mat2quat(rotation @ quat2mat(pose[3:])) @ true)))) < 0.5
    assert read_unit(out / "attic_train.csv") == read_unit(out / "attic_test.csv") == "model units"
    assert sorted(path.name for path in out.iterdir()) == [
        "attic_test.csv", "attic_test.json", "attic_train.csv", "attic_train.json", "images", "sparse"]


def test_stretches_are_apart(prepared):
    out, output = prepared
    test = [*range(18, 22), *range(40, 44)]
    assert [row[3] for row in read_rows(out / "attic_test.csv")] == [name_of(i) for i in test]
    train = [i for i in range(N) if i not in test and i not in (17, 22, 39)]
    assert [row[3] for row in read_rows(out / "attic_train.csv")] == [name_of(i) for i in train]
    assert "3 frames between training and test stretches are left out of both" in output


def test_the_next_commands_are_ready_to_paste(prepared):
    out, output = prepared
    commands = [shlex.split(line) for line in output.partition("\nNext:\n")[2].splitlines()]
    assert [command[1:4] for command in commands] == [
        ["main.py", "posenet", "train"], ["main_learn_pose_encoding.py", "posenet", "train"],
        ["main_refine_apr.py", "posenet", "optimize"]]
    for command, split in zip(commands, ("train", "train", "test"), strict=True):
        assert command[5:8] == [str(out / "images"), str(out / f"attic_{split}.csv"), "config.json"]
    assert preparation.MIN_REMEMBERED == MIN_FRAMES


def test_photos_are_written_upright(walk, prepared):
    for i in (0, 1):
        before = np.asarray(Image.open(walk[0] / name_of(i)).convert("RGB"), dtype=int)
        with Image.open(prepared[0] / "images" / name_of(i)) as image:
            assert image.size == (320, 240) and ExifTags.Base.Orientation not in image.getexif()
            after = np.asarray(image, dtype=int)
        upright = np.rot90(before, -1) if i in TURNED else before
        assert np.abs(after - upright).mean() < (4 if i in TURNED else 1e-9)


def test_two_photos_scale_the_model_to_metres(walk, copied):
    truth = walk[1]
    pair = name_of(3), name_of(30)
    distance = np.linalg.norm(truth[pair[0]][0] - truth[pair[1]][0])
    model = listing(copied / "sparse")
    output = call_well(prepare_photos, walk[0], copied, "--name", "loft", "--scale_by", *pair, distance)
    assert "sparse: used again" in output and "positions in metres" in output
    assert abs(scale_to(labelled(copied, "loft"), truth) - 1) < 0.02
    assert read_unit(copied / "loft_train.csv") == read_unit(copied / "loft_test.csv") == "m"
    assert listing(copied / "sparse") == model


def test_gps_positions_scale_the_model_to_metres(walk, copied):
    output = call_well(prepare_photos, walk[0], copied, "--scale_by_gps", "--every", 8)
    assert f"Scale from the GPS positions of {len(TURNED)} photos" in output
    poses = labelled(copied)
    assert len(poses) == N and abs(scale_to(poses, walk[1]) * GPS_SCALE - 1) < 0.02
    assert read_unit(copied / "attic_test.csv") == "m"
    assert [row[3] for row in read_rows(copied / "attic_test.csv")] == [name_of(i) for i in range(7, N, 8)]


def test_gps_positions_that_say_nothing_are_refused(walk, copied):
    for i in TURNED:  # as far off as the room is large
        path = copied / "images" / name_of(i)
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps_of(np.random.default_rng(i).normal(size=3) * 5))
        Image.open(path).save(path, exif=exif.tobytes())
    error = error_of(prepare_photos, walk[0], copied, "--scale_by_gps")
    assert f"--scale_by_gps: the GPS positions of {len(TURNED)} photos do not agree with the model" in error
    for i in TURNED[2:]:
        Image.open(copied / "images" / name_of(i)).save(copied / "images" / name_of(i))
    error = error_of(prepare_photos, walk[0], copied, "--scale_by_gps")
    assert "--scale_by_gps: 2 of the 44 placed photos have a GPS position; at least 3 are needed" in error
    assert not list(copied.glob("*.csv"))


def test_a_scale_by_a_photo_that_is_not_placed(walk, copied):
    error = error_of(prepare_photos, walk[0], copied, "--scale_by", "noise0.png", name_of(0), 1)
    assert "--scale_by noise0.png: not among the 44 images that the model has placed" in error
    assert not list(copied.glob("*.csv"))


def test_a_model_of_other_photos_is_not_taken(walk, copied):
    error = error_of(prepare_photos, walk[0] / "walk one", copied)
    assert f"{copied / 'sparse'}: is of other photos than" in error


def write_photos(folder, *names):
    folder.mkdir()
    for i, name in enumerate(names):
        write_noise(folder / name, i)
    return folder


def write_copies(folder):
    write_photos(folder, "0.jpg")
    for i in range(1, 12):
        shutil.copy(folder / "0.jpg", folder / f"{i}.jpg")


MISTAKES = {
    "no photos": (lambda photos: write_photos(photos), [], "photos: no photo; give a folder"),
    "no images": (lambda photos: (write_photos(photos) / "notes.txt").touch(), [], "photos: no photo, but 1 .txt"),
    "unrelated": (lambda photos: write_photos(photos, "a.jpg", "b.jpg", "c.png"), [],
                  "COLMAP finds no model of the 3 photos"),
    "one photo": (lambda photos: write_photos(photos, "a.jpg"), [], "COLMAP finds no model of the 1 photos"),
    "one many times": (write_copies, [], "COLMAP finds no model of the 12 photos"),
    "damaged": (lambda photos: (write_photos(photos, "a.jpg") / "b.jpg").write_bytes(b"no image"), [],
                "b.jpg cannot be read"),
    "one name": (lambda photos: write_photos(photos, "a.jpg", "a.bmp"), [], "would both be a.jpg; keep one of them"),
    "scale by no photo": (lambda photos: write_photos(photos, "a.jpg", "b.jpg"), ["--scale_by", "a.jpg", "c.jpg", "1"],
                          "--scale_by c.jpg: not among the 2 photos, such as a.jpg"),
    "no distance": (lambda photos: write_photos(photos, "a.jpg", "b.jpg"), ["--scale_by", "a.jpg", "b.jpg", "far"],
                    "'far' is no distance in metres"),
    "scene with a slash": (lambda photos: write_photos(photos, "a.jpg"), ["--name", "a/b"], "--name 'a/b'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_with_photos_ends_in_one_clear_line(case, tmp_path):
    write, more, words = MISTAKES[case]
    write(tmp_path / "photos")
    assert words in error_of(prepare_photos, tmp_path / "photos", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_photos_and_their_copies_keep_apart(tmp_path):
    photos = write_photos(tmp_path / "photos", "a.jpg")
    assert "lies among the photos" in error_of(prepare_photos, photos, photos / "out")
    assert "lies among the photos" in error_of(prepare_photos, photos, tmp_path)
    (tmp_path / "out/images").mkdir(parents=True)
    assert "images exists already, without a model" in error_of(prepare_photos, photos, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images"]


def test_two_ways_to_scale_exclude_each_other(tmp_path):
    status, _, errors = run_module_here(prepare_photos, tmp_path, tmp_path, "--scale_by", "a", "b", "1",
                                        "--scale_by_gps")
    assert status == 2 and "not allowed with" in errors


def test_every_pair_of_few_photos_and_neighbours_of_many_are_matched():
    assert len(prepare_photos.pairs_to_match(300)) == 300 * 299 / 2
    pairs = set(prepare_photos.pairs_to_match(1000))
    assert len(pairs) < 15000 and all(first < second for first, second in pairs)
    assert all((i, i + step) in pairs for i in range(990) for step in range(1, 11)) and (0, 990) in pairs


# Units and merging

def test_the_unit_of_a_label_file(tmp_path):
    path = tmp_path / "attic.csv"
    assert read_unit(path) == "m"
    for unit in ("m", "model units"):
        path.with_suffix(".json").write_text(json.dumps({"unit": unit}))
        assert read_unit(path) == unit
    for text, meant in (("{}", {}), ('\ufeff{"unit": null, "convention": null, "other": 1}', {}),
                        ('{"convention": "colmap"}', {"convention": "colmap"})):
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        assert describe(path) == {"unit": "m", **meant}
    for text, words in (('{"unit": "feet"}', 'unit "feet" is unknown; it must be "m" or "model units"'),
                        ("[1]", "attic.json: not a JSON object"), ("[" * 100000, "not readable as JSON"),
                        ('{"unit": "m", "convention": "visloc"}', 'convention "visloc" is unknown; it must be "7Sc'),
                        ("{unit", "attic.json: not readable as JSON")):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_unit(path)


def write_scenes(folder, *scenes):
    """Write label files of two frames per scene; returns their paths."""
    return [write_labels(folder / f"{scene}.csv", write_scene(folder, scene, 2, "train")) for scene in scenes]


def test_label_files_are_merged(tmp_path):
    paths = write_scenes(tmp_path, "attic", "cellar", "shed")
    for path in paths:
        path.with_suffix(".json").write_text('{"unit": "model units", "convention": "colmap"}')
    output = call_well(merge_labels, *paths, tmp_path / "all.csv")
    merged, rows = read_rows(tmp_path / "all.csv"), [row for path in paths for row in read_rows(path)]
    assert [row[:4] for row in merged] == [row[:4] for row in rows]
    np.testing.assert_array_equal([pose_of(row) for row in merged], [pose_of(row) for row in rows])
    assert describe(tmp_path / "all.csv") == {"unit": "model units", "convention": "colmap"}
    assert "6 frames (attic: 2, cellar: 2, shed: 2)" in output
    paths[1].with_suffix(".json").write_text('{"unit": "model units"}')
    call_well(merge_labels, *paths, tmp_path / "all.csv")
    assert describe(tmp_path / "all.csv") == {"unit": "model units"}  # of one scene it is unknown
    paths[1].with_suffix(".json").write_text('{"unit": "model units", "convention": "7Scenes"}')
    call_well(merge_labels, *paths, tmp_path / "all.csv")
    assert describe(tmp_path / "all.csv")["convention"] == "colmap"  # which means the same


def test_a_mistake_with_files_to_merge_ends_in_one_clear_line(tmp_path):
    attic, cellar = write_scenes(tmp_path, "attic", "cellar")
    out = tmp_path / "all.csv"
    again = tmp_path / "again.csv"
    again.write_text(attic.read_text())
    assert "again.csv: scene attic is in" in error_of(merge_labels, attic, again, out)
    again.write_text(attic.read_text().replace("attic,train", "loft,train"))
    assert "2 problems: " in (error := error_of(merge_labels, attic, again, out))
    assert "image attic/seq-train/frame-000000.color.png is in" in error
    assert "is given twice" in error_of(merge_labels, attic, attic, out)
    assert "is a file to merge" in error_of(merge_labels, attic, cellar, cellar)
    cellar.with_suffix(".json").write_text('{"unit": "model units"}')
    assert "cellar.csv: positions in model units, but in m in" in error_of(merge_labels, attic, cellar, out)
    for path, convention in ((attic, "colmap"), (cellar, "CambridgeLandmarks")):
        path.with_suffix(".json").write_text(f'{{"unit": "m", "convention": "{convention}"}}')
    assert "cellar.csv: quaternions as in CambridgeLandmarks, but as in colmap in" in error_of(
        merge_labels, attic, cellar, out)
    attic.with_suffix(".json").unlink()
    cellar.with_suffix(".json").write_text('{"unit": "ells"}')
    assert 'unit "ells" is unknown' in error_of(merge_labels, attic, cellar, out)
    assert not out.exists() and not out.with_suffix(".json").exists()
    cellar.with_suffix(".json").unlink()
    assert "all.json: a label file is a .csv file; its description" in error_of(
        merge_labels, attic, cellar, out.with_name("all.json"))
    assert not out.with_name("all.json").exists()
    about_weights = {"model": "posenet", "unit": "m"}
    out.with_suffix(".json").write_text(json.dumps(about_weights))
    assert "its description would overwrite" in error_of(merge_labels, attic, cellar, out)
    assert not out.exists() and json.loads(out.with_suffix(".json").read_text()) == about_weights
