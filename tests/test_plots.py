"""What the pictures show, and that nothing in them is clipped. Whether they are legible, a person must judge."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED
from matplotlib.quiver import Quiver
from PIL import Image

from datasets.labels import poses_of, read_labels
from datasets.official import convention_of_scenes
from engine import plots
from engine.prediction_plot import predicted
from engine.report import convention_of
from util.metrics import pose_err

PUBLISHED_LABELS = SHARED / "data" / "labels"
needs_published_labels = pytest.mark.skipif(not PUBLISHED_LABELS.is_dir(),
                                            reason="the published labels are not available")
NAME = "a-long-name-$with_dollar^^$-signs" * 2


@pytest.fixture(scope="module")
def tested():
    """Frames of two scenes: their labels, true poses, estimates and errors.

    The first scene's sequences alternate in the file. One frame has no estimate. Names are long, with dollar signs.
    """
    random = np.random.default_rng(0)
    n = 40
    labels = pd.DataFrame({"scene": ["attic"] * 30 + [NAME] * 10,
                           "seq": [f"seq-0{1 + i % 2}" for i in range(30)] + ["seq-01"] * 10,
                           "img_path": [f"a/{NAME}/frame-{i:06d}.png" for i in range(n)]})
    truth = np.concatenate([random.standard_normal((n, 3)) * (4, 2, 0.3), np.tile((1.0, 0, 0, 0), (n, 1))], axis=1)
    estimate = truth + 0.1 * random.standard_normal((n, 7))
    truth[5, 0] = estimate[5, 0] = 1e6  # a mistake in the labels
    estimate[7] = np.nan
    return labels, truth, estimate, [e.numpy() for e in pose_err(torch.tensor(estimate), torch.tensor(truth))]


@pytest.fixture(scope="module")
def figures(tested):
    """All pictures of a test and of a training: {name: figure}."""
    labels, truth, estimate, errors = tested
    before = [errors[0] * 1.5, errors[1]]
    losses = np.random.default_rng(0).standard_normal(60) + 2
    curves = np.array([[20 * epoch, 1e-4, 1 / epoch, 2 / epoch, 30 / epoch, np.nan if epoch % 2 else 3 / epoch, np.nan]
                       for epoch in (1, 2, 3)])
    return {"positions": plots.positions(labels["scene"], truth, estimate, errors[0]),
            "errors": plots.cumulative(labels["scene"], errors, before),
            "sequences": plots.sequences(labels, errors, before),
            "worst": plots.worst(labels, errors, lambda i: Image.new("RGB", (341, 256), (i, 0, 0))),
            "novelty": plots.left_out(errors, np.append(np.nan, np.arange(39))),
            "training": plots.training(losses, curves, (1, 1))}


@pytest.mark.parametrize("name", ["positions", "errors", "sequences", "worst", "novelty", "training"])
def test_every_axis_has_its_unit_and_nothing_is_clipped(figures, name, tmp_path):
    figure = figures[name]
    plots.save(figure, tmp_path / "picture.png")
    width, height = Image.open(tmp_path / "picture.png").size
    assert 1000 <= width <= 1200
    box = figure.get_tightbbox()  # in inches
    assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()
    for axes in figure.axes:
        if axes.lines or axes.collections:
            has_unit = any(unit in axes.get_ylabel() for unit in ("[m]", "[deg]", "[%]", "loss", "learning rate"))
            assert has_unit or not axes.yaxis.get_tick_params()["labelleft"]


def test_each_estimate_is_joined_to_its_truth_and_coloured_by_its_error(tested):
    labels, truth, estimate, errors = tested
    figure = plots.positions(labels["scene"], truth, estimate, errors[0])
    above, side = figure.axes[3:5]  # the second scene
    frames = [i for i in range(30) if i != 7]
    # The cameras are not rotated: down is +y, so that x and z are seen from above, and y points down.
    for axes, (a, b) in ((above, (0, 2)), (side, (0, 1))):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"{'xyz'[a]} [m]", f"{'xyz'[b]} [m]")
        [lines, points] = axes.collections
        true_positions, estimated = truth[frames][:, [a, b]], estimate[frames][:, [a, b]]
        assert np.allclose(lines.get_segments(), np.stack([true_positions, estimated], axis=1))
        assert np.allclose(points.get_offsets(), estimated)
        assert np.array_equal(lines.get_array(), errors[0][frames])
        assert np.array_equal(points.get_array(), errors[0][frames])
        assert np.ptp(axes.get_xlim()) < 40  # the frame far away is outside
    assert side.yaxis_inverted() and not above.yaxis_inverted()
    assert np.ptp(above.get_xlim()) == pytest.approx(np.ptp(above.get_ylim()))


@needs_published_labels
@pytest.mark.parametrize("name, vertical", [
    ("7scenes_all_scenes", (1, True)),  # y is the Kinect's, downwards
    # z is upwards, as the heights of the cameras show
    ("abs_cambridge_pose_sorted.csv_KingsCollege_test", (2, False)),
    ("abs_cambridge_pose_sorted.csv_ShopFacade_test", (2, False)),
    ("abs_cambridge_pose_sorted.csv_GreatCourt_train", (2, False)),
])
def test_the_vertical_axis_of_the_datasets_is_found(name, vertical):
    table = read_labels(PUBLISHED_LABELS / f"{name}.csv")
    for scene, rows in table.groupby("scene"):
        for convention in (None, convention_of_scenes([scene])):
            assert plots.vertical(np.array(poses_of(rows)), convention) == vertical, scene


@pytest.mark.parametrize("about, names, known", [
    ({"convention": "colmap"}, None, "colmap"), ({"convention": ["colmap"]}, ["chess", "fire"], "7Scenes"),
    ({"scene_names": ["OldHospital"]}, None, "CambridgeLandmarks"), ({"convention": {}}, None, None),
    ({"convention": "opencv", "scene_names": 5}, None, None), ({}, ["chess", "KingsCollege"], None)])
def test_weights_tell_the_convention(about, names, known):
    assert convention_of(about, names) == known


@pytest.mark.parametrize("convention, ahead", [("7Scenes", [[1, 0]]), ("colmap", [[1, 0]]),
                                               ("CambridgeLandmarks", [[-1, 0]]), (None, [])])
def test_viewing_directions_are_drawn_where_the_convention_is_known(convention, ahead):
    """A camera turned by a right angle about y, the vertical axis, seen from above."""
    poses = np.array([(0, 0, 0, 1, 0, 1, 0), (1, 0, 1, np.nan, 0, 0, 0)])
    above, side = predicted(np.zeros((0, 7)), poses, convention=convention).axes[:2]
    drawn = {axes: [[u, v] for arrows in axes.collections if isinstance(arrows, Quiver)
                    for u, v in zip(arrows.U, arrows.V)] for axes in (above, side)}
    assert (above.get_xlabel(), above.get_ylabel(), side.get_ylabel()) == ("x [m]", "z [m]", "y [m]")
    np.testing.assert_allclose(np.reshape(drawn[above], (-1, 2)), np.reshape(ahead, (-1, 2)), atol=1e-12)
    assert len(drawn[side]) == len(ahead)


def test_cumulative_error_curves_are_shares_of_frames():
    position, ours = np.random.default_rng(0).permutation(np.arange(1.0, 101)), np.full(100, np.nan)
    figure = plots.cumulative(pd.Series(["attic"] * 100), [position, ours], before=[50 * position, 2 * position])
    first, second = figure.axes
    for line, factor in zip(first.lines, (1, 50), strict=True):
        assert np.array_equal(line.get_xdata()[:101], factor * np.arange(101))
        assert np.allclose(line.get_ydata(), [*range(101), 100])
        assert line.get_drawstyle() == "steps-post"
        assert line.get_xdata()[101] == first.get_xlim()[1]  # it stays at 100 %
    assert [line.get_label() for line in first.lines] == ["50.500 m: attic", "2525.000 m: attic, the APR alone"]
    assert [line.get_label() for line in second.lines] == ["nan deg: attic", "101.00 deg: attic, the APR alone"]
    assert first.get_xlim()[1] > 4900  # both curves are visible
    assert (first.get_title(), second.get_title()) == ("Position error", "Orientation error, 100 of 100 frames beyond")
    position[0] = 1e7
    first, _ = plots.cumulative(pd.Series(["attic"] * 100), [position, position]).axes
    assert first.get_title() == "Position error, 1 of 100 frames beyond"


def test_errors_are_drawn_sequence_by_sequence(tested):
    labels, _, _, errors = tested
    before = [errors[1], errors[0]]
    figure = plots.sequences(labels, errors, before)
    keys = labels["scene"] + "/" + labels["seq"]
    for axes, pair in zip(figure.axes, zip(before, errors)):
        for line, error in zip(axes.lines, pair, strict=False):
            first, second, third = (error[keys == key] for key in keys.unique())
            drawn = np.concatenate([first, [np.nan], second, [np.nan], third])
            assert np.array_equal(line.get_ydata(), drawn, equal_nan=True)
            positions = [*range(15), np.nan, *range(15, 30), np.nan, *range(30, 40)]
            assert np.array_equal(line.get_xdata(), positions, equal_nan=True)
    assert all(tick == int(tick) for tick in plots.sequences(labels[:2], [e[:2] for e in errors]).axes[1].get_xticks())
    [names] = figure.axes[0].child_axes
    assert {label.get_text(): at for at, label in zip(names.get_xticks(), names.get_xticklabels())} == {
        "attic/seq-01": 7, "attic/seq-02": 22, "..." + f"{NAME}/seq-01"[-17:]: 34.5}


@pytest.mark.parametrize("alone", [True, False])
def test_the_legend_names_each_line_in_its_colour(alone):
    """The legend's entries, their colours and dashes; it covers nothing else on the page."""
    labels = pd.DataFrame({"scene": ["attic"] * 3, "seq": ["1"] * 3})
    figure = plots.sequences(labels, [np.array([1.0, 2, 9]), np.array([10.0, 20, 90])],
                             None if alone else [np.array([3.0, 4, 9]), np.array([30.0, 40, 90])])
    figure.draw_without_rendering()
    for axes, before, median in zip(figure.axes, ("4.000 m", "40.00 deg"), ("2.000 m", "20.00 deg")):
        legend = axes.get_legend()
        entries = {text.get_text(): (line.get_color(), line.get_linestyle())
                   for text, line in zip(legend.get_texts(), legend.get_lines())}
        frames = {"each frame": (plots.COLOURS[0], "-")}
        if not alone:
            frames[f"the APR alone: each frame, median {before}"] = ("0.65", "-")
        assert entries == frames | {f"median {median}": (plots.COLOURS[1], "--")}
        [drawn] = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert set(drawn.get_ydata()) == {float(median.split()[0])} and drawn.get_color() == plots.COLOURS[1]
        box = legend.get_window_extent()
        texts = [figure.axes[1].xaxis.label, *figure.axes[1].get_xticklabels()]
        assert not any(box.overlaps(other.get_window_extent()) for other in (*figure.axes, *texts))


def test_a_training_is_drawn_over_epochs():
    curves = [[2, 1e-3, 5.0, 0.4, 40.0, np.nan, np.nan], [4, 1e-4, -1.0, 0.2, 20.0, 0.3, 30.0]]
    loss, rate, position, orientation = plots.training(np.array([6.0, 4, 0, -2]), np.array(curves)).axes

    def shown(axes):
        return [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines]

    assert shown(loss) == [[[0.5, 1, 1.5, 2], [6, 4, 0, -2]], [[1, 2], [5, -1]]]
    assert shown(rate) == [[[0, 1, 2], [1e-3, 1e-3, 1e-4]]] and rate.lines[0].get_drawstyle() == "steps-pre"
    assert shown(position) == [[[1, 2], [0.4, 0.2]], [[2], [0.3]]]
    assert shown(orientation) == [[[1, 2], [40, 20]], [[2], [30]]]
    assert [line.get_label() for line in position.lines] == ["training, as it goes", "validation"]
    position, orientation = plots.training(np.array([6.0, 4, 0, -2]), np.array(curves), (0.25, 25)).axes[2:]
    assert shown(position)[2] == [[2], [0.25]] and shown(orientation)[2] == [[2], [25]]


def test_the_worst_frames_are_shown_with_their_errors(tested):
    labels = tested[0]
    errors = [np.zeros(40), np.zeros(40)]
    # 4 is in 2's sequence and near it, 39 in the other scene and near 31.
    errors[0][[0, 2, 4, 12, 31, 39]] = 0.1, 9, 7, 5, np.nan, 8
    errors[1][[1, 3, 12, 14, 24]] = 40, 30, 60, 50, 20  # 3 is near 1, and 14 near 12, which is in the first row too
    shown = []
    figure = plots.worst(labels, errors, lambda i: shown.append(int(i)) or Image.new("RGB", (341, 256)))
    assert shown == [31, 2, 12, 12, 1, 24]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1] == f"...{f'a/{NAME}/frame-000002.png'[-41:]}\n9.00 m, 0.0 deg"
    assert titles[3].endswith("\n5.00 m, 60.0 deg")


def test_near_frames_fill_a_row_that_would_be_short():
    """Of twelve frames, two of a row are ten frames apart, and the third is nearer. Two frames are in both rows."""
    labels = pd.DataFrame({"scene": ["attic"] * 12, "seq": ["1"] * 12, "img_path": ["a.png"] * 12})
    errors = [np.array([1.0, 9, 8, 7, 2, 2, 2, 2, 2, 2, 2, 0.5]), np.array([2.0, 3, 4, 9, 5, 6, 7, 8, 1, 1, 1, 1])]

    def shown(n):
        frames = []
        image = Image.new("RGB", (9, 9))
        plots.worst(labels[:n], [error[:n] for error in errors], lambda i: frames.append(int(i)) or image)
        return frames

    assert shown(12) == [1, 11, 2, 3, 7, 6]
    assert shown(2) == [1, 0, 1, 0]


@pytest.mark.parametrize("n", [1, 2])
def test_few_frames_are_drawn_too(tmp_path, n):
    labels = pd.DataFrame({"scene": ["attic"] * n, "seq": ["1"] * n, "img_path": ["a.png"] * n})
    poses = np.tile((0.0, 0, 0, 1, 0, 0, 0), (n, 1))
    paths = plots.draw_test(tmp_path / "run", labels, poses, poses, [np.zeros(n)] * 2,
                            lambda i: Image.new("RGB", (9, 9)), "tested")
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(path.split("/")[-1] for path in map(str, paths))


def test_every_picture_of_a_test_says_what_was_tested(tested, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.draw_test("run", *tested, lambda i: Image.new("RGB", (9, 9)), "apr.pth on test.csv")
    assert [figure.get_suptitle() for figure in figures] == ["apr.pth on test.csv"] * 4


def test_the_errors_left_are_those_of_the_frames_that_are_kept():
    position, orientation = np.array([4.0, 1, 3, 2]), np.array([10.0, 20, 30, 40])
    figure = plots.left_out([position, orientation], np.array([8.0, 1, 2, 3]))
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines[:2]}
    by_novelty, oracle = curves["the most novel frames"], curves["those of the largest error: the oracle"]
    assert by_novelty == [[75, 1], [50, 2], [25, 2], [0, 2.5]] and oracle == [[75, 1], [50, 1.5], [25, 2], [0, 2.5]]
    assert figure.axes[1].lines[2].get_ydata()[0] == 25  # chance
