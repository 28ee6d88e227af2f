"""The page to look at poses: what a click shows in a browser, where cameras are, and what is counted."""
import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import COLUMNS, run_module_here, write_labels
from PIL import Image
from prepare_layouts import call_well, error_of
from test_video import SHOWN, rotate, write_video

from engine import thumbnails, viewer

CHROMIUM = shutil.which("chromium")
SOFTWARE_GL = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
RED, GREEN, BLUE = (200, 30, 30), (30, 160, 30), (30, 30, 200)
ODD_NAME = "</script><b>&amp;.png"  # would end a script, be bold, and lose its ampersand
# A camera's centre, 3 numbers in the axes of the plot, as pixels of the window.
PROJECT = """(point) => {
  const scene = plot._fullLayout.scene._scene, {model, view, projection} = scene.glplot.cameraParams;
  const times = (m, v) => [0, 1, 2, 3].map((row) => v.reduce((sum, x, k) => sum + m[4 * k + row] * x, 0));
  const scaled = [...point.map((x, k) => x * scene.dataScale[k]), 1];
  const [x, y, , w] = times(projection, times(view, times(model, scaled)));
  const box = scene.container.getBoundingClientRect();
  return [box.x + box.width * (1 + x / w) / 2, box.y + box.height * (1 - y / w) / 2];
}"""


def row(name, position, quaternion=(1, 0, 0, 0), scene="attic", more=()):
    return ",".join(map(str, [scene, "test", "s", name, *position, *quaternion, *more]))


def write_image(path, colour, size=(80, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def view(folder, *more, convention="7Scenes"):
    """What the viewer prints for pred.csv of a folder, and the data in its page."""
    output = call_well(viewer, folder / "pred.csv", "--dataset_path", folder, "--convention", convention, *more)
    return output, data_of(folder / "pred.html")


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Five estimated poses, of which the third is off by 3, 4 and 0 m and by 90 degrees, and the last has no image."""
    folder = tmp_path_factory.mktemp("walk")
    names = ["2.png", "10.png", ODD_NAME, "20.png", "30.png"]
    for name, colour in zip(names[:4], (RED, GREEN, BLUE, RED), strict=True):
        write_image(folder / name, colour)
    positions = [(0, 0, 0), (10, 0, 0), (0, 0, 10), (10, 0, 10), (5, -4, 5)]
    write_labels(folder / "pred.csv", [row(*pose) for pose in zip(names, positions, strict=True)][::-1])
    truth = [row(name, position) for name, position in zip(names, positions, strict=True)]
    truth[2] = row(ODD_NAME, (3, 4, 10), (0.5 ** 0.5, 0, 0, 0.5 ** 0.5))
    write_labels(folder / "true.csv", truth)
    training = [row(f"t{i}.png", (i, 0, i)) for i in range(10)]
    write_labels(folder / "train.csv", [*training, row("c.png", (99, 99, 99), scene="cellar")])
    output, _ = view(folder, "--labels_file", folder / "true.csv", "--training_labels", folder / "train.csv")
    return folder, output


@pytest.fixture
def page(walk):
    """The page of `walk` in a browser that has recorded its requests and errors: page, requests, errors."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_GL)
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((walk[0] / "pred.html").as_uri())
        page.wait_for_function("!drawing && shown === 0")
        yield page, requests, errors
        browser.close()


def shown(page):
    """The numbers beside the plot, {label: text}, and the colour of the image, or None without one."""
    terms, values = page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents()
    colour = page.evaluate("""async () => {
      const image = document.getElementById("image");
      if (image.hidden) return null;
      await image.decode();
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.drawImage(image, 0, 0);
      return [...canvas.getImageData(20, 20, 1, 1).data].slice(0, 3);
    }""")
    return dict(zip(terms, values, strict=True)), colour


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_click_on_a_camera_shows_its_image_and_its_numbers(page):
    page, requests, errors = page
    numbers, colour = shown(page)
    assert numbers["image"] == "2.png" and np.allclose(colour, RED, atol=12)
    # y points down here, as the images do: the plot's axes are x, z and y.
    for point, name, wanted, position_error, degrees in (
            ((0, 10, 0), ODD_NAME, BLUE, "5", "90"), ((10, 0, 0), "10.png", GREEN, "0", "0"),
            ((3, 10, 4), ODD_NAME, BLUE, "5", "90"),  # the true camera
            ((5, 5, -4), "30.png", None, "0", "0")):
        x, y = page.evaluate(PROJECT, point)
        page.mouse.move(x - 40, y - 40)
        page.evaluate("window.found = false; plot.once('plotly_hover', () => { window.found = true; })")
        page.mouse.move(x, y, steps=4)
        page.wait_for_function("window.found", timeout=10000)  # the plot looks below the mouse in its next picture
        page.wait_for_timeout(200)
        assert page.locator(".hovertext").text_content() == name
        page.mouse.click(x, y)
        page.wait_for_function("(name) => !drawing && data.names[shown] === name", arg=name, timeout=10000)
        numbers, colour = shown(page)
        assert numbers["image"] == name and numbers["position error [m]"] == position_error
        assert numbers["orientation error [deg]"] == degrees
        assert (colour is None) == (wanted is None) and (colour is None or np.allclose(colour, wanted, atol=12))
        assert page.locator("#none").is_visible() == (wanted is None)
    assert not errors
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.url]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_slider_goes_along_the_sequence(page):
    page, _, errors = page
    page.locator("#slider").focus()
    names = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        names.append(shown(page)[0]["image"])
    assert names == ["10.png", "20.png", "30.png", ODD_NAME]  # in natural order
    page.locator("#before").click()
    assert shown(page)[0]["image"] == "30.png" and page.locator("#place").text_content() == "4 of 5" and not errors
    page.wait_for_function("!drawing && shown === 3")
    marked = page.evaluate("plot.data[plot.data.length - 1]")
    assert [5, 5, -4] in np.round(np.array([marked[k][:-1] for k in "xyz"], float).T, 3).tolist()


def test_what_is_shown_is_counted(walk):
    folder, output = walk
    first, images, last = output.splitlines()
    assert first.startswith("Images: 1 of 5 shown without a picture: it does not exist") and "30.png" in first
    assert images.startswith("Images: 4, at most 480 x 480 pixels")
    assert "pred.html: 5 cameras, 5 with their true poses, coloured by position error [m]; " in last
    training = [position for position in data_of(folder / "pred.html")["training"] if position]
    np.testing.assert_allclose(training, [(i, 0, i) for i in range(10)])  # of this scene only


@pytest.mark.parametrize("convention, depth, right", [("7Scenes", (1, 0, 0), (0, 0, -1)), ("colmap", (1, 0, 0),
                         (0, 0, -1)), ("CambridgeLandmarks", (-1, 0, 0), (0, 0, 1))])
def test_corners_of_a_camera_that_is_turned_by_a_right_angle(tmp_path, convention, depth, right):
    """Turned about y, so that z becomes x, and x becomes -z; world-to-camera it is the other way round."""
    write_image(tmp_path / "a.png", RED)
    centre = np.array((1.5, -2, 3))
    write_labels(tmp_path / "pred.csv", [row("a.png", centre, (2, 0, 2, 0)), row("b.png", (9, 9, 9))])  # not unit
    _, data = view(tmp_path, convention=convention)
    corners = np.reshape(data["estimate"][0], (5, 3))
    size = (corners[1:].mean(axis=0) - centre) @ depth
    assert size > 0
    right, down, depth = map(np.array, (right, (0, 1, 0), depth))
    wanted = [depth - 0.6 * right - 0.45 * down, depth + 0.6 * right - 0.45 * down,
              depth + 0.6 * right + 0.45 * down, depth - 0.6 * right + 0.45 * down]
    np.testing.assert_allclose(corners, [centre, *(centre + size * corner for corner in wanted)], atol=1e-4 * size)


@pytest.mark.parametrize("quaternion, order", [((1, 0, 0, 0), [0, 2, 1]), ((0, 1, 0, 0), [2, 0, 1])])
def test_the_axes_stay_right_handed_where_the_vertical_points_up_or_down(tmp_path, quaternion, order):
    write_image(tmp_path / "a.png", RED)
    write_labels(tmp_path / "pred.csv", [row("a.png", (0, 0, 0), quaternion), row("b.png", (4, 2, 3), quaternion)])
    _, data = view(tmp_path)
    (_, _, (low, high)), points_down = data["ranges"], quaternion[0] == 1  # images point down along y, or -y
    assert data["order"] == order and (low > high) == points_down
    x, y, z = np.eye(3)[data["order"]] * [[1], [1], [-1 if points_down else 1]]
    np.testing.assert_allclose(np.cross(x, y), z)


def test_positions_in_model_units_are_no_metres(tmp_path):
    write_image(tmp_path / "a.png", RED)
    for name in ("pred", "true"):
        write_labels(tmp_path / f"{name}.csv", [row("a.png", (0, 0, 0)), row("b.png", (1, 2, 3))])
    (tmp_path / "true.json").write_text('{"unit": "model units"}')
    output, data = view(tmp_path, "--labels_file", tmp_path / "true.csv")
    assert data["axes"] == [f"{axis} [model units]" for axis in "xyz"] and "position error [model units]" in output
    assert "position error [model units]" in data["labels"] and "[m]" not in json.dumps(data)
    write_labels(tmp_path / "train.csv", [row("c.png", (0, 0, 0))])
    assert "positions in m, but in model units" in error_of(
        viewer, tmp_path / "pred.csv", "--dataset_path", tmp_path, "--convention", "7Scenes",
        "--labels_file", tmp_path / "true.csv", "--training_labels", tmp_path / "train.csv")


def test_the_convention_is_asked_for_where_nothing_says_it(tmp_path):
    write_image(tmp_path / "a.png", RED)
    turned = [row(f"{name}.png", (i, 0, 0), (1, 0, 1, 0)) for i, name in enumerate("ab")]
    for name in ("pred", "true"):
        write_labels(tmp_path / f"{name}.csv", turned)
    viewed = viewer, tmp_path / "pred.csv", "--dataset_path", tmp_path
    assert "true.csv: nothing says whose convention its quaternions have; give --convention" in error_of(
        *viewed, "--labels_file", tmp_path / "true.csv")
    (tmp_path / "true.json").write_text('{"unit": "m", "convention": "CambridgeLandmarks"}')
    call_well(*viewed, "--labels_file", tmp_path / "true.csv")
    known = data_of(tmp_path / "pred.html")["estimate"]
    assert known == view(tmp_path, convention="CambridgeLandmarks")[1]["estimate"]
    assert known != view(tmp_path, convention="7Scenes")[1]["estimate"]
    write_labels(tmp_path / "train.csv", turned)
    (tmp_path / "train.json").write_text('{"unit": "m", "convention": "colmap"}')
    assert "train.csv: quaternions as in colmap, but as in CambridgeLandmarks in" in error_of(
        *viewed, "--labels_file", tmp_path / "true.csv", "--training_labels", tmp_path / "train.csv")
    call_well(*viewed, "--convention", "colmap", "--labels_file", tmp_path / "true.csv", "--training_labels",
              tmp_path / "train.csv")
    (tmp_path / "true.json").unlink()
    write_labels(tmp_path / "true.csv", [line.replace("attic", "GreatCourt") for line in turned])
    lines = (tmp_path / "pred.csv").read_text().splitlines()
    (tmp_path / "pred.csv").write_text("\n".join(line.split(",", 3)[3] for line in lines) + "\n")  # as of PoseNet
    call_well(*viewed, "--labels_file", tmp_path / "true.csv")
    assert data_of(tmp_path / "pred.html")["estimate"] == known
    write_labels(tmp_path / "pred.csv", [line.replace("attic", "GreatCourt") for line in turned])
    call_well(*viewed)
    assert data_of(tmp_path / "pred.html")["estimate"] == known


def test_frames_of_a_video_are_shown_and_axes_as_they_are(tmp_path):
    rows = [row(f"walk.mp4#{i:06d}", (7.3, 0.01 * i, 8)) for i in (0, 2, 4, 9)]
    write_labels(tmp_path / "pred.csv", [*rows, row("a.png", (7, 0, 8))])
    command = tmp_path / "pred.csv", "--dataset_path", tmp_path, "--convention", "7Scenes"
    assert "has none of the 5 images" in error_of(viewer, *command)
    (tmp_path / "walk.mp4").touch()
    output, data = view(tmp_path)
    assert "walk.mp4: cannot be read as a video" in output and data["images"] == [None] * 5
    assert f"4 of 5 shown without a picture: it cannot be read, such as {tmp_path / 'walk.mp4#000000'}" in output
    frames = [np.full((48, 64, 3), colour, np.uint8) for colour in (RED, GREEN, BLUE, RED, GREEN)]
    rotate(write_video(tmp_path / "walk.mp4", frames), SHOWN[90][1])
    write_image(tmp_path / "a.png", BLUE)
    output, data = view(tmp_path)
    images = [text and Image.open(io.BytesIO(base64.b64decode(text))) for text in data["images"]]
    assert data["names"][1:] == [f"walk.mp4#{i:06d}" for i in (0, 2, 4, 9)] and images[4] is None
    for image, colour in zip(images, (BLUE, RED, BLUE, GREEN), strict=False):
        assert np.allclose(np.asarray(image).mean(axis=(0, 1)), colour, atol=12)
    assert [image.size for image in images[1:4]] == [(48, 64)] * 3  # upright
    assert f"1 of 5 shown without a picture: it cannot be read, such as {tmp_path / 'walk.mp4#000009'}" in output
    assert "Images: 4, at most 480 x 480 pixels" in output and data["axes"] == ["x [m]", "y [m]", "z [m]"]


def test_positions_far_from_the_origin_are_drawn_near_it(tmp_path):
    write_image(tmp_path / "a.png", RED)
    far = np.array((512300.25, -5402100.5, 0))
    write_labels(tmp_path / "pred.csv", [row(f"{name}.png", far + i) for i, name in enumerate("abc")])
    _, data = view(tmp_path)
    np.testing.assert_allclose([camera[0] for camera in data["estimate"]], [-0.75, 0.25, 1.25], atol=1e-6)
    assert data["axes"] == ["x -512301 [m]", "y +5402100 [m]", "z -1 [m]"] and "512300.2500" in data["texts"][0][1]


def test_rejected_frames_are_left_out_and_novelty_colours_the_others(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", RED)
    rows = [row("a.png", (0, 0, 0), more=(1.25, "False")), row("b.png", [""] * 3, [""] * 4, more=(9.5, "True"))]
    (tmp_path / "pred.csv").write_text("\n".join([f"{COLUMNS},novelty,rejected", *rows]) + "\n")
    status, output, _ = run_module_here(viewer, tmp_path / "pred.csv", tmp_path / "out.html", "--dataset_path",
                                        tmp_path, "--convention", "7Scenes")
    assert status == 0 and "1 cameras, 0 with their true poses, coloured by novelty" in output
    data = data_of(tmp_path / "out.html")
    assert data["names"] == ["a.png"] and data["values"] == [1.25]
    assert dict(zip(data["labels"], data["texts"][0], strict=True))["rejected"] == "False"


def test_labels_that_lack_a_frame_leave_it_without_a_true_pose(tmp_path):
    write_image(tmp_path / "a.png", RED)
    write_labels(tmp_path / "pred.csv", [row("a.png", (0, 0, 0)), row("b.png", (1, 2, 3))])
    write_labels(tmp_path / "true.csv", [row("b.png", (1, 2, 1)), row("other.png", (0, 0, 0))])
    output, data = view(tmp_path, "--labels_file", tmp_path / "true.csv")
    assert "lacks 1 of 2 frames, such as a.png" in output and "2 cameras, 1 with their true poses" in output
    assert data["truth"][0] is None and data["values"] == [None, 2]


def test_images_shrink_to_fit_into_the_page(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    names = [f"{i}.jpg" for i in range(8)]
    for name in names:
        Image.fromarray(noise).save(tmp_path / name)
    write_labels(tmp_path / "pred.csv", [row(name, (i, 0, 0)) for i, name in enumerate(names)])
    widths = []
    for bytes_of_all in (thumbnails.IMAGE_BYTES, 100e3):
        monkeypatch.setattr(thumbnails, "IMAGE_BYTES", bytes_of_all)
        output, data = view(tmp_path)
        images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in data["images"]]
        assert {image.format for image in images} == {"JPEG"} and len({image.size for image in images}) == 1
        assert sum(map(len, data["images"])) <= bytes_of_all
        widths.append(images[0].width)
        assert images[0].height == 0.75 * images[0].width and f"at most {widths[-1]} x {widths[-1]} pixels" in output
    assert widths[0] == 480 > widths[1]


@pytest.mark.parametrize("more, words", [
    (["--dataset_path", "{}/nowhere"], "nowhere: no such folder; give the one that img_path is relative to"),
    (["--dataset_path", "{}/empty"], "empty: has none of the 2 images, such as"),
    (["--labels_file", "{}/other.csv"], "other.csv: has none of the 2 frames, such as 'a.png'"),
    (["--labels_file", "{}/twice.csv"], "twice.csv: row 3: img_path 'a.png' appears twice"),
    (["--labels_file", "{}/none.csv"], "none.csv: not a readable label file"),
    (["--training_labels", "{}/cellar.csv"], "cellar.csv: no frames of scene 'attic'; it has cellar"),
    (["--scene", "loft"], "no frames of scene 'loft'; it has attic"),
])
def test_mistakes_end_in_one_line_and_leave_the_page_as_it_was(tmp_path, more, words):
    write_image(tmp_path / "a.png", RED)
    (tmp_path / "empty").mkdir()
    rows = [row("a.png", (0, 0, 0)), row("b.png", (1, 2, 3))]
    for name, listed in (("pred", rows), ("twice", rows[:1] * 2), ("other", [row("c.png", (0, 0, 0))]),
                         ("cellar", [row("c.png", (0, 0, 0), scene="cellar")])):
        write_labels(tmp_path / f"{name}.csv", listed)
    (tmp_path / "pred.html").write_text("before")
    assert words in error_of(viewer, tmp_path / "pred.csv", "--dataset_path", tmp_path, "--convention", "7Scenes",
                             *(word.format(tmp_path) for word in more))
    assert (tmp_path / "pred.html").read_text() == "before" and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("text, words", [
    (None, "not a readable label file: No such file or directory"),
    ("img_path,novelty\na.png,1\n", "column 't1' is missing"),
    (f"{COLUMNS}\n{row('a.png', (0, 0, 'nan'))}\n", "row 2: t3 'nan' is not a finite number"),
    (f"{COLUMNS}\n{row('a.png', (0, 0, 0))}\n{row('b.png', (0, 0, 0), scene='cellar')}\n",
     "frames of 2 scenes, each with coordinates of its own; choose one with --scene: attic, cellar"),
])
def test_unusable_predictions_end_in_one_line(tmp_path, text, words):
    write_image(tmp_path / "a.png", RED)
    if text is not None:
        (tmp_path / "pred.csv").write_text(text)
    options = ["--dataset_path", tmp_path, "--convention", "7Scenes"]
    assert words in error_of(viewer, tmp_path / "pred.csv", *options)
    if text is not None:
        assert "stays as it is" in error_of(viewer, tmp_path / "pred.csv", tmp_path / "pred.csv", *options)
