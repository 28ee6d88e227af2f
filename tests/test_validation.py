"""--val_labels_file: the log has a test's medians, and the best weights are those of the epoch that it names.

What else shows a training: TensorBoard's curves, and progress bars.
"""
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, fails_here, run_here, same_weights, signal_after_step, weights_of, write_labels, write_scene
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import training


class Terminal(io.StringIO):
    """A stream that is taken for a terminal, where progress bars are shown."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def layout(tmp_path_factory, small_frames):
    root = tmp_path_factory.mktemp("validation")
    for split, n in (("train", 7), ("test", 5)):
        write_labels(root / f"{split}.csv", write_scene(root, "attic", n, split))
    return root


def arguments(layout, mode, out, *more, validated=True, **settings):
    labels = layout / ("train.csv" if mode == "train" else "test.csv")
    validation = ["--val_labels_file", layout / "test.csv"] if mode == "train" and validated else []
    return ["posenet", mode, "none", layout, labels, ROOT / "config.json", *more, *validation,
            "--output_dir", layout / out, "--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=5",
            "batch_size=4", "n_workers=0", "precision=fp32", "lr=1e-3", "n_freq_checkpoint=1",
            *(f"{key}={value}" for key, value in settings.items())]


def logged_validations(output):
    """What a training logged of its validations.

    Returns {epoch: medians}, the epoch that the log names as the best, or 'final', and the final weights' medians.
    """
    found = dict(re.findall(r"^Validation after epoch (\d+): median pose error: (\S+, \S+?\])", output,
                            flags=re.MULTILINE))
    best = re.search(r"^Best in validation: (?:those after epoch (\d+)|the final weights), \S+_best.pth$", output,
                     flags=re.MULTILINE)
    final = re.search("^Validation of the final weights: median pose error: (.*)$", output, flags=re.MULTILINE)
    return {int(epoch): text for epoch, text in found.items()}, int(best[1]) if best[1] else "final", final[1]


def medians_of_test(layout, script, *weights):
    """The medians that a test logs; its progress bar must show the same."""
    with contextlib.redirect_stderr(Terminal()) as terminal:
        output = run_here(script, *arguments(layout, "test", "tested", *weights, test_batch_size=2))
    medians = re.search("^Median pose error: (.*)$", output, flags=re.MULTILINE)[1]
    shown = re.findall(r"5/5 \[.* median ([\d.]+) m, ([\d.]+) deg\]", terminal.getvalue())[-1]
    if script != "main_refine_apr.py":  # its bar shows the APR's
        expected = [float(text) for text in re.findall(r"[\d.]+(?=\[)", medians)]
        assert [float(number) for number in shown] == pytest.approx(expected, abs=0.006)
    return medians


def test_the_best_weights_are_those_of_the_epoch_that_the_log_names(layout):
    of_apr = run_here("main.py", *arguments(layout, "train", "apr"))
    apr = weights_of(of_apr)
    of_pae = run_here("main_learn_pose_encoding.py", *arguments(layout, "train", "pae", apr))
    of_refiner = run_here("main_refine_apr.py", *arguments(layout, "train", "rpr", apr, "none"))
    for script, output, weights in (
            ("main.py", of_apr, ["--checkpoint_path"]),
            ("main_learn_pose_encoding.py", of_pae, [apr, "--encoder_checkpoint_path"]),
            ("main_refine_apr.py", of_refiner, [apr, "none", "--rpr_checkpoint_path"])):
        validations, best, final = logged_validations(output)
        assert sorted(validations) == [1, 2, 3, 4, 5]
        prefix = str(weights_of(output)).removesuffix("_final.pth")
        assert json.loads(Path(f"{prefix}_best.json").read_text())["epoch"] == best
        competing = {**validations, "final": final}
        position = {epoch: float(text.split("[")[0]) for epoch, text in competing.items()}
        assert position[best] == min(position.values())
        for weights_file, medians in ((f"{prefix}_checkpoint-2.pth", validations[2]),
                                      (f"{prefix}_best.pth", competing[best]), (weights_of(output), final)):
            assert medians_of_test(layout, script, *weights, weights_file) == medians


@pytest.mark.parametrize("final_wins", [False, True])
def test_the_final_weights_compete_with_those_of_epochs(layout, monkeypatch, final_wins):
    medians = iter([0.5, 0.3, 0.4, 0.2 if final_wins else 0.35])
    monkeypatch.setattr(training, "validation_errors", lambda *args: [next(medians), 1.0])
    output = run_here("main.py", *arguments(layout, "train", "competing", n_epochs=3))
    final = weights_of(output)
    best = str(final).replace("_final.pth", "_best.pth")
    named, epoch = ("the final weights", "final") if final_wins else ("those after epoch 2", 2)
    assert f"\nBest in validation: {named}, {best}\n" in output
    assert json.loads(Path(best.replace(".pth", ".json")).read_text())["epoch"] == epoch
    assert same_weights(best, final if final_wins else best.replace("best", "checkpoint-2"))


@pytest.fixture(scope="module")
def shown_training(layout):
    """A training with validation every second epoch, TensorBoard and progress bars: what it printed and its bars."""
    with contextlib.redirect_stderr(Terminal()) as terminal:
        output = run_here("main.py", *arguments(layout, "train", "shown", "--tensorboard", n_freq_validate=2))
    return output, terminal.getvalue()


def tensorboard_curves(output):
    """What a training wrote for TensorBoard: {tag: [(step, value), ...]}."""
    [folder] = re.findall("^TensorBoard: (.*)$", output, flags=re.MULTILINE)
    events = EventAccumulator(folder).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_training_shows_its_losses_and_errors_in_a_progress_bar_and_in_tensorboard(shown_training):
    output, bars = shown_training
    assert re.search(r"10/10 \[\S+<\S+, +[\d.]+(batch/s|s/batch), epoch 5, loss -?\d+\.\d{3}, \d+\.\d\d m, "
                     r"\d+\.\d\d deg\]", bars)
    curves = tensorboard_curves(output)
    medians = [[float(number) for number in re.findall(r"[\d.]+(?=\[)", text)]
               for text in logged_validations(output)[0].values()]
    for values, name in zip(zip(*medians), ("position error [m]", "orientation error [deg]")):
        steps, of_validation = zip(*curves[f"{name}/validation"])
        assert steps == (4, 8) and of_validation == pytest.approx(values, abs=5.1e-4)
        assert [step for step, _ in curves[f"{name}/training"]] == [2, 4, 6, 8, 10]
    losses = [loss for _, loss in curves["loss/batch"]]
    assert [loss for _, loss in curves["loss/epoch"]] == pytest.approx(
        [(4 * a + 3 * b) / 7 for a, b in zip(losses[::2], losses[1::2])])
    assert curves["learning rate"] == [(step, pytest.approx(1e-3)) for step in (2, 4, 6, 8, 10)]


def test_validation_does_not_change_a_training(layout, shown_training):
    output, _ = shown_training
    assert sorted(logged_validations(output)[0]) == [2, 4]
    plain = run_here("main.py", *arguments(layout, "train", "plain", validated=False))
    assert same_weights(weights_of(output), weights_of(plain))


def test_a_stopped_training_resumes_its_validation_and_curves(layout, shown_training):
    whole, _ = shown_training
    with signal_after_step(7):
        status, _ = fails_here("main.py", *arguments(layout, "train", "stopped", "--tensorboard", n_freq_validate=2))
    assert status == 143
    resumed = ["--resume", "latest", "--tensorboard"]
    status, message = fails_here("main.py", *arguments(layout, "train", "stopped", *resumed, validated=False,
                                                       n_freq_validate=2))
    assert status == 2 and "this training began with --val_labels_file" in message
    output = run_here("main.py", *arguments(layout, "train", "stopped", *resumed, n_freq_validate=2))
    assert logged_validations(output)[1:] == logged_validations(whole)[1:]
    assert tensorboard_curves(output) == tensorboard_curves(whole)
    assert same_weights(*(str(weights_of(run)).replace("_final", "_best") for run in (whole, output)))


def test_validation_and_curves_are_for_training(layout):
    for option in (["--val_labels_file", layout / "test.csv"], ["--tensorboard"]):
        weights = "--checkpoint_path", layout / "test.csv"  # which is never read
        status, message = fails_here("main.py", *arguments(layout, "test", "tested", *weights, *option))
        assert status == 2 and f"{option[0]} is for training" in message
