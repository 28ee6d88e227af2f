"""Smoothing of predicted poses along a walk, against closed forms and filterpy."""
import numpy as np
import pandas as pd
import pytest
from conftest import MINI, PUBLISHED, run_module_here, run_script
from filterpy.common import Q_continuous_white_noise
from filterpy.kalman import KalmanFilter
from scipy.spatial.transform import Rotation

from datasets import export_poses, smooth_poses
from datasets.labels import POSE_COLUMNS, poses_of, read_labels
from util.smoothing import fit, smooth

AXIS = np.array([2, -1, 2]) / 3
SPEEDS = np.array([0.7, 0.9])


def poses_at(positions, angles, axis=AXIS):
    """Poses of positions (N x 3) and turns around one axis (N, radians): N x 7."""
    return np.hstack((positions, np.roll(Rotation.from_rotvec(np.outer(angles, axis)).as_quat(), 1, axis=1)))


def rotations(poses):
    return Rotation.from_quat(np.roll(poses[:, 3:], -1, axis=1))


def walk(n, noise=(0.0, 0.0), seed=0):
    """True poses of a curved walk with turns beyond 180 degrees, and the same with noise (metres, radians)."""
    random, t = np.random.default_rng(seed), np.arange(n) / 20
    true = poses_at(np.stack((np.cos(t), np.sin(t), t / 5), axis=1), t)
    turns = Rotation.from_rotvec(noise[1] * random.standard_normal((n, 3))) * rotations(true)
    positions = true[:, :3] + noise[0] * random.standard_normal((n, 3))
    return true, np.hstack((positions, np.roll(turns.as_quat(), 1, axis=1)))


def write(path, poses, folder="attic/seq-01", **columns):
    """Write predictions. poses: N x 7, NaN for a rejected frame."""
    names = [f"{folder}/frame-{i}.png" for i in range(len(poses))]
    table = pd.DataFrame({"img_path": names, **dict(zip(POSE_COLUMNS, np.transpose(poses))), **columns})
    table.to_csv(path, index=False)
    return path


def smoothed(tmp_path, predictions, *arguments):
    """Run the command; returns the table that it wrote, and what it printed."""
    status, output, errors = run_module_here(smooth_poses, predictions, tmp_path / "out.csv", *arguments)
    assert status == 0, errors
    assert all("with neighbouring frames" in line for line in output.splitlines())
    return pd.read_csv(tmp_path / "out.csv"), output


def errors(poses, true):
    """Errors in metres and degrees, N each."""
    turns = rotations(poses) * rotations(true).inv()
    return np.linalg.norm(poses[:, :3] - true[:, :3], axis=1), np.degrees(turns.magnitude())


def of_filterpy(values, times, variances, acceleration, speed):
    """Filtered and smoothed values (N each) of filterpy's Kalman filter and RTS smoother; NaN has no measurement."""
    model = KalmanFilter(dim_x=2, dim_z=1)
    model.x, model.P, model.H = np.array([[values[0]], [0]]), np.diag([variances[0], speed ** 2]), np.array([[1.0, 0]])
    steps = np.diff(times)
    transitions = [np.array([[1, dt], [0, 1]]) for dt in steps]
    noises = [Q_continuous_white_noise(2, dt, acceleration) for dt in steps]
    start = model.x.copy(), model.P.copy()
    measured = [None if np.isnan(value) else value for value in values[1:]]
    means, covariances, *_ = model.batch_filter(measured, Fs=transitions, Qs=noises, Rs=list(variances[1:]))
    means, covariances = (np.concatenate((first[None], rest)) for first, rest in zip(start, (means, covariances)))
    smooth_means, *_ = model.rts_smoother(means, covariances, [np.eye(2), *transitions], [np.eye(2), *noises])
    return means[:, 0, 0], smooth_means[:, 0, 0]


@pytest.mark.parametrize("causal", [True, False])
def test_positions_and_turns_around_an_axis_are_those_of_filterpy(causal):
    random, n = np.random.default_rng(0), 60
    times = np.cumsum(random.uniform(0.02, 0.3, n))
    variances = np.stack((random.uniform(0.01, 0.1, n), random.uniform(1e-3, 1e-2, n)), axis=1)
    accelerations = np.array([0.3, 0.2])
    angles = 1.5 * times + 0.1 * random.standard_normal(n)  # through more than 360 degrees
    positions = np.stack((np.sin(times), times, 0 * times), axis=1) + 0.2 * random.standard_normal((n, 3))
    poses = poses_at(positions, angles)
    poses[[7, 8, 30]] = positions[[7, 8, 30]] = angles[[7, 8, 30]] = np.nan
    found, used = smooth(poses, times, variances, accelerations, SPEEDS, causal)
    assert used.sum() == n - 3
    for k in range(3):
        expected = of_filterpy(positions[:, k], times, variances[:, 0], accelerations[0], SPEEDS[0])[not causal]
        np.testing.assert_allclose(found[:, k], expected, atol=1e-8)
    expected = of_filterpy(angles, times, variances[:, 1], accelerations[1], SPEEDS[1])[not causal]
    assert errors(found, poses_at(found[:, :3], expected))[1].max() < 1e-6


def test_the_filter_knows_no_later_frames():
    _, noisy = walk(80, (0.1, 0.05))
    noisy[30:33, :3] += 50
    given = np.tile((0.01, 0.0025), (80, 1)), np.array((1e-4, 1e-4)), SPEEDS
    found, used = smooth(noisy, np.arange(80.0), *given, causal=True)
    for n in (1, 31, 50):
        before, _ = smooth(noisy[:n], np.arange(float(n)), given[0][:n], *given[1:], causal=True)
        np.testing.assert_array_equal(before, found[:n])
    assert used.sum() == 77


@pytest.mark.parametrize("arguments", [(), ("--causal",)])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_constant_velocity_without_noise_stays_as_it_is(tmp_path, n, arguments):
    t = np.arange(n, dtype=float)
    true = poses_at(np.outer(t, [0.1, -0.2, 0.05]) + [3, 4, 5], np.radians(9) * t - 1)  # 351 degrees in all
    flips = np.random.default_rng(0).choice([-1, 1], (n, 1))
    table, output = smoothed(tmp_path, write(tmp_path / "in.csv", true), *arguments)
    # The velocity is unknown at first, which moves the second frame by less than a thousandth of its way.
    assert np.max(errors(table[POSE_COLUMNS].to_numpy(), true)) < 1e-6
    assert f"{n} frames: {n} poses used, 0 gated" in output
    assert (table["smoothed"] == ("filter" if arguments else "smoother")).all()
    quaternions = table[POSE_COLUMNS[3:]].to_numpy()
    assert np.allclose(np.linalg.norm(quaternions, axis=1), 1)
    assert (np.sum(quaternions[1:] * quaternions[:-1], axis=1) > 0).all()
    once = (tmp_path / "out.csv").read_bytes()
    write(tmp_path / "in.csv", np.hstack((true[:, :3], 2.5 * flips * true[:, 3:])))  # nor need they be unit
    again, _ = smoothed(tmp_path, tmp_path / "in.csv", *arguments)
    np.testing.assert_allclose(again[POSE_COLUMNS], table[POSE_COLUMNS], atol=1e-9)
    assert once.count(b"\n") == n + 1


def test_noise_is_estimated_well_enough(tmp_path):
    true, noisy = walk(200, (0.1, 0.05))
    variances, *dynamics = fit([(noisy, np.arange(200.0), np.ones((200, 2)))])
    assert 0.5 < np.sqrt(variances[0]) / 0.1 < 2 and 0.5 < np.sqrt(variances[1]) / 0.05 < 2
    table, output = smoothed(tmp_path, write(tmp_path / "in.csv", noisy))
    before, after = errors(noisy, true), errors(table[POSE_COLUMNS].to_numpy(), true)
    assert all(np.median(a) < 0.5 * np.median(b) for a, b in zip(after, before))
    filtered, _ = smoothed(tmp_path, tmp_path / "in.csv", "--causal")
    causal = errors(filtered[POSE_COLUMNS].to_numpy(), true)
    assert all(np.median(a) < np.median(c) < 0.8 * np.median(b) for a, c, b in zip(after, causal, before))
    _, output = smoothed(tmp_path, tmp_path / "in.csv", "--position_noise", "0.25", "--orientation_noise", "3")
    assert "noise along an axis: 0.25[m], 3[deg] (as given)" in output


@pytest.mark.parametrize("causal, where", [(False, 30), (False, 0), (False, 79), (True, 30)])
def test_an_outlier_is_gated(tmp_path, causal, where):
    true, noisy = walk(80, (0.02, 0.01))
    noisy[where, :3] += [3000, 0, 0]
    table, output = smoothed(tmp_path, write(tmp_path / "in.csv", noisy), *(["--causal"] if causal else []))
    assert "79 poses used, 1 gated" in output and list(table.index[table["measured"] == "gated"]) == [where]
    position, orientation = errors(table[POSE_COLUMNS].to_numpy(), true)
    assert position.max() < 0.2 and orientation.max() < 5


def test_most_of_a_short_walk_outvotes_its_first_frame():
    true, noisy = walk(5, (0.02, 0.01))
    noisy[0, :3] += [3000, 0, 0]
    found, used = smooth(noisy, np.arange(5.0), np.tile((4e-4, 1e-4), (5, 1)), np.array((1e-5, 1e-5)), SPEEDS)
    assert used.tolist() == [False, True, True, True, True] and errors(found, true)[0].max() < 0.2


def test_a_camera_that_is_carried_elsewhere_is_followed(tmp_path):
    true, noisy = walk(80, (0.02, 0.01))
    for poses in (true, noisy):
        poses[40:, :3] += [0, 500, 0]
    write(tmp_path / "in.csv", noisy)
    table, output = smoothed(tmp_path, tmp_path / "in.csv")
    assert "80 poses used" in output and errors(table[POSE_COLUMNS].to_numpy(), true)[0].max() < 0.1
    table, output = smoothed(tmp_path, tmp_path / "in.csv", "--causal")  # which learns of it after five frames
    assert "76 poses used, 4 gated" in output
    assert (errors(table[POSE_COLUMNS].to_numpy(), true)[0] > 100).nonzero()[0].tolist() == [40, 41, 42, 43]


def test_rejected_frames_are_bridged_and_other_commands_read_the_result(tmp_path):
    true, noisy = walk(80, (0.02, 0.01))
    noisy[[0, 1, 20, 21, 22]] = np.nan
    rejected = np.isnan(noisy[:, 0])
    write(tmp_path / "in.csv", noisy, rejected=rejected, novelty=np.where(rejected, 9, 1.0), position_error_m=0.5)
    table, output = smoothed(tmp_path, tmp_path / "in.csv")
    assert "75 poses used, 0 gated as outliers, 5 of 5 frames without a pose bridged" in output
    assert "left out, since they are of single frames: position_error_m" in output and "position_error_m" not in table
    assert errors(table[POSE_COLUMNS].to_numpy(), true)[0].max() < 0.15
    assert (table["measured"] == "missing").tolist() == rejected.tolist() and not table["rejected"].any()
    read = poses_of(read_labels(tmp_path / "out.csv", ["img_path", *POSE_COLUMNS]))
    np.testing.assert_array_equal(read, table[POSE_COLUMNS])
    status, printed, _ = run_module_here(export_poses, tmp_path / "out.csv", tmp_path / "out.tum", "--format", "tum",
                                         "--convention", "colmap")
    assert status == 0 and "80 poses" in printed
    table, output = smoothed(tmp_path, tmp_path / "in.csv", "--causal")  # nothing comes before the first two
    assert "3 of 5 frames without a pose bridged" in output
    assert table["rejected"].tolist() == [True, True] + 78 * [False]
    assert table[POSE_COLUMNS].iloc[:2].isna().all(axis=None)
    assert len(read_labels(tmp_path / "out.csv", ["img_path", *POSE_COLUMNS])) == 78


@pytest.mark.parametrize("kind", ["expected errors", "novelty"])
def test_doubtful_frames_count_less(tmp_path, kind):
    true, noisy = walk(200, (0.05, 0.02))
    doubtful = np.random.default_rng(1).random(200) < 0.3
    noisy[doubtful] = walk(200, (0.2, 0.08), seed=2)[1][doubtful]
    score = np.where(doubtful, 4.0, 1.0)
    columns = {"novelty": score} if kind == "novelty" else {
        "expected_position_error_m": 0.1 * score, "expected_orientation_error_deg": 2 * score}
    alike, _ = smoothed(tmp_path, write(tmp_path / "in.csv", noisy))
    weighed, output = smoothed(tmp_path, write(tmp_path / "in.csv", noisy, **columns))
    assert f"weighed by {kind}" in output
    without, informed = (np.mean(errors(table[POSE_COLUMNS].to_numpy(), true), axis=1) for table in (alike, weighed))
    assert (informed < 0.9 * without).all()


def test_walks_are_folders_in_natural_order_or_in_that_of_their_times(tmp_path):
    _, noisy = walk(24, (0.05, 0.02))
    given = "--position_noise", "0.05", "--orientation_noise", "1"
    one, _ = smoothed(tmp_path, write(tmp_path / "one.csv", noisy), *given)
    shuffled = np.random.default_rng(0).permutation(24)
    table = pd.read_csv(tmp_path / "one.csv").iloc[shuffled]
    table.to_csv(tmp_path / "shuffled.csv", index=False)
    other, _ = smoothed(tmp_path, tmp_path / "shuffled.csv", *given)
    pd.testing.assert_frame_equal(other, one.iloc[shuffled].reset_index(drop=True))

    timed = pd.read_csv(tmp_path / "one.csv").assign(time_s=np.arange(24) / 30)
    timed["img_path"] = [f"attic/seq-01/{name}.png" for name in shuffled]
    timed.iloc[shuffled].to_csv(tmp_path / "timed.csv", index=False)
    other, _ = smoothed(tmp_path, tmp_path / "timed.csv", *given)
    np.testing.assert_allclose(other[POSE_COLUMNS], one[POSE_COLUMNS].iloc[shuffled], atol=1e-9)

    # A frame that a model with several scenes took for one of another scene is no part of the walk.
    far = noisy.copy()
    far[5, :3] = 700
    scenes = np.where(np.arange(24) == 5, "cellar", "attic")
    other, output = smoothed(tmp_path, write(tmp_path / "scenes.csv", far, predicted_scene=scenes), *given)
    np.testing.assert_allclose(other[POSE_COLUMNS].iloc[5].to_numpy(float)[:3], 700)
    assert "24 poses used" in output and "attic, walks: 1" in output and "cellar, walks: 1" in output


def test_the_command_measures_its_gain(tmp_path):
    true, noisy = walk(120, (0.1, 0.05))
    noisy[50] = np.nan
    write(tmp_path / "in.csv", noisy, rejected=np.isnan(noisy[:, 0]))
    columns = {"scene": "attic", "split": "test", "seq": "seq-01"}
    write(tmp_path / "true.csv", true[:110], **columns)
    (tmp_path / "true.json").write_text('{"unit": "model units"}')
    process = run_script("-m", "datasets.smooth_poses", tmp_path / "in.csv", tmp_path / "out.csv", "--labels",
                         tmp_path / "true.csv")
    assert process.returncode == 0, process.stderr
    table = pd.read_csv(tmp_path / "out.csv")
    after = errors(table[POSE_COLUMNS].to_numpy()[:110], true[:110])
    written = table[["position_error_m", "orientation_error_deg"]][:110]
    np.testing.assert_allclose(written, np.transpose(after), atol=1e-6)
    rows = np.delete(np.arange(110), 50)
    medians = [np.median(error[rows]) for error in after]
    before = [np.median(error) for error in errors(noisy[rows], true[rows])]
    assert "median pose error {:.3f}[model units], {:.3f}[deg]; of the same 109 frames singly {:.3f}[model units], " \
        "{:.3f}[deg]".format(*medians, *before) in process.stdout
    for name, old, new in zip(("position", "orientation"), before, medians):
        assert f"change of the median {name} error {100 * (new / old - 1):+.1f}% (95% interval -" in process.stdout
    assert "10 of 120 frames are not in" in process.stdout and "of 1 bridged frames" in process.stdout


@pytest.mark.skipif(not (MINI.is_dir() and PUBLISHED.is_dir()), reason="the published predictions are not available")
def test_published_predictions_of_real_frames(tmp_path):
    _, output = smoothed(tmp_path, PUBLISHED / "errors_test.csv", "--labels", MINI / "expected_test.csv")
    assert "of the same 120 frames singly 0.140[m], 4.731[deg]" in output


@pytest.mark.parametrize("change, words", [
    (lambda table: table.drop(columns="q3"), "column 'q3' is missing"),
    (lambda table: table.assign(t2=["0", "zero", "0"]), "row 3: t2 'zero' is not a finite number"),
    (lambda table: table.assign(q1=0.0, q2=0, q3=0, q4=0), "no orientation"),
    (lambda table: table.assign(novelty=["1", "high", "1"]), "row 3: novelty 'high' is not a number"),
    (lambda table: table.assign(time_s=[0, None, 1]), "row 3: time_s is empty or not finite"),
    (lambda table: table.assign(time_s=[0, 1, 1]), "rows 3 and 4: two frames of a folder have one time_s, 1"),
    (lambda table: table.assign(img_path="a.png"), "rows 2 and 3: image 'a.png' is listed twice"),
    (lambda table: table.assign(**dict.fromkeys(POSE_COLUMNS, "")), "no frame has a pose"),
    (lambda table: table.assign(smoothed="filter"), "smoothed already"),
], ids=range(9))
def test_mistakes_in_a_file_end_in_one_line(tmp_path, change, words):
    write(tmp_path / "in.csv", walk(3)[0])
    change(pd.read_csv(tmp_path / "in.csv", dtype=object)).to_csv(tmp_path / "in.csv", index=False)
    status, _, line = run_module_here(smooth_poses, tmp_path / "in.csv", tmp_path / "out.csv")
    assert status == 2 and words in line and "in.csv" in line and line.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path):
    write(tmp_path / "in.csv", walk(3)[0])
    write(tmp_path / "true.csv", walk(3)[0], folder="cellar", scene="cellar", split="test", seq="1")
    for arguments, words in (((tmp_path / "in.csv",), "is an input, which stays as it is"),
                             ((tmp_path / "out.csv", "--position_noise", "-1"), "'-1' is not a number above 0"),
                             ((tmp_path / "out.csv", "--labels", tmp_path / "true.csv"), "has none of the frames")):
        status, _, text = run_module_here(smooth_poses, tmp_path / "in.csv", *arguments)
        assert status == 2 and words in text and not (tmp_path / "out.csv").exists()
