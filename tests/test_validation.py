"""--val_labels_file: what is logged is what a test finds, and the best weights are those of the epoch that the log names. And what
else is to be seen of a training: TensorBoard's curves, progress bars."""
import contextlib
import io
import json
import os
import re
import signal

import pytest
import torch
from conftest import ROOT, fails_here, run_here, weights_of, write_labels, write_scene
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util import engine


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    for split, n in (("train", 7), ("test", 5)):
        write_labels(root / f"{split}.csv", write_scene(root, "attic", n, split))
    return root


def arguments(layout, mode, out, *more, **settings):
    labels = layout / ("train.csv" if mode == "train" else "test.csv")
    validation = ["--val_labels_file", layout / "test.csv"] if mode == "train" else []
    return ["posenet", mode, "none", layout, labels, ROOT / "config.json", *more, *validation, "--output_dir", layout / out,
            "--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=5", "batch_size=4", "n_workers=0", "precision=fp32",
            "lr=1e-3", "n_freq_checkpoint=1", *(f"{key}={value}" for key, value in settings.items())]


def logged(output):
    """{epoch: medians} of the validations, the epoch that the log names as the best, or 'final', and the final weights' medians."""
    found = dict(re.findall(r"^Validation after epoch (\d+): median pose error: (\S+, \S+?\])", output, flags=re.MULTILINE))
    best = re.search(r"^Best in validation: (?:those after epoch (\d+)|the final weights), \S+_best.pth$", output, flags=re.MULTILINE)
    return ({int(epoch): text for epoch, text in found.items()}, int(best[1]) if best[1] else "final",
            re.search("^Validation of the final weights: median pose error: (.*)$", output, flags=re.MULTILINE)[1])


def found_in_test(layout, script, *weights):
    with contextlib.redirect_stderr(Terminal()) as terminal:
        output = run_here(script, *arguments(layout, "test", "tested", *weights, test_batch_size=2))
    found = re.search("^Median pose error: (.*)$", output, flags=re.MULTILINE)[1]
    shown = re.findall(r"5/5 \[.* median ([\d.]+) m, ([\d.]+) deg\]", terminal.getvalue())[-1]
    if script != "main_refine_apr.py":  # its bar shows the APR's
        assert [float(number) for number in shown] == pytest.approx([float(text) for text in re.findall(r"[\d.]+(?=\[)", found)], abs=0.006)
    return found


def test_the_best_weights_are_those_of_the_epoch_that_the_log_names(layout):
    output = run_here("main.py", *arguments(layout, "train", "apr"))
    apr = weights_of(output)
    scripts = {"main.py": (output, ["--checkpoint_path"]),
               "main_learn_pose_encoding.py": (run_here("main_learn_pose_encoding.py", *arguments(layout, "train", "pae", apr, latent_views=2)),
                                               [apr, "--encoder_checkpoint_path"]),
               "main_refine_apr.py": (run_here("main_refine_apr.py", *arguments(layout, "train", "rpr", apr, "none")),
                                      [apr, "none", "--rpr_checkpoint_path"])}
    for script, (output, weights) in scripts.items():
        validations, best, final = logged(output)
        assert sorted(validations) == [1, 2, 3, 4, 5]
        prefix = str(weights_of(output)).removesuffix("_final.pth")
        assert json.loads(open(f"{prefix}_best.json").read())["epoch"] == best
        competing = {**validations, "final": final}
        position = {epoch: float(text.split("[")[0]) for epoch, text in competing.items()}
        assert position[best] == min(position.values())
        for weights_file, medians in ((f"{prefix}_checkpoint-2.pth", validations[2]), (f"{prefix}_best.pth", competing[best]),
                                      (weights_of(output), final)):
            assert found_in_test(layout, script, *weights, weights_file) == medians


def curves(output):
    """What a training has written for TensorBoard: {tag: [(step, value), ...]}."""
    [folder] = re.findall("^TensorBoard: (.*)$", output, flags=re.MULTILINE)
    events = EventAccumulator(folder).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("final_wins", [False, True])
def test_the_final_weights_compete_with_those_of_epochs(layout, monkeypatch, final_wins):
    medians = iter([0.5, 0.3, 0.4, 0.2 if final_wins else 0.35])
    monkeypatch.setattr(engine, "_validate", lambda *args: ([median := next(medians), 1.0], f"{median:.3f}[m], 1.000[deg]"))
    output = run_here("main.py", *arguments(layout, "train", "competing", n_epochs=3))
    final = weights_of(output)
    best = str(final).replace("_final.pth", "_best.pth")
    said, epoch = ("the final weights", "final") if final_wins else ("those after epoch 2", 2)
    assert f"\nBest in validation: {said}, {best}\n" in output
    assert json.loads(open(best.replace(".pth", ".json")).read())["epoch"] == epoch
    expected = torch.load(final if final_wins else best.replace("best", "checkpoint-2"))
    assert all(torch.equal(value, expected[key]) for key, value in torch.load(best).items())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_validation_changes_no_training_and_goes_on_with_it(layout, monkeypatch):
    listed = arguments(layout, "train", "validated", "--tensorboard", n_freq_validate=2)
    with contextlib.redirect_stderr(Terminal()) as terminal:
        whole = run_here("main.py", *listed)
    assert re.search(r"10/10 \[\S+<\S+, +[\d.]+(batch/s|s/batch), epoch 5, loss -?\d+\.\d{3}, \d+\.\d\d m, \d+\.\d\d deg\]", terminal.getvalue())
    shown = curves(whole)
    medians = [[float(number) for number in re.findall(r"[\d.]+(?=\[)", text)] for text in logged(whole)[0].values()]
    for values, name in zip(zip(*medians), ("position error [m]", "orientation error [deg]")):
        steps, of_validation = zip(*shown[f"{name}/validation"])
        assert steps == (4, 8) and of_validation == pytest.approx(values, abs=5.1e-4)
        assert [step for step, _ in shown[f"{name}/training"]] == [2, 4, 6, 8, 10]
    losses = [loss for _, loss in shown["loss/batch"]]
    assert [loss for _, loss in shown["loss/epoch"]] == pytest.approx(
        [(4 * a + 3 * b) / 7 for a, b in zip(losses[::2], losses[1::2])])
    assert shown["learning rate"] == [(step, pytest.approx(1e-3)) for step in (2, 4, 6, 8, 10)]

    assert sorted(logged(whole)[0]) == [2, 4]
    without = [part for part in arguments(layout, "train", "plain") if part not in ("--val_labels_file", layout / "test.csv")]
    first, second = (torch.load(weights_of(output)) for output in (whole, run_here("main.py", *without)))
    assert all(torch.equal(first[key], second[key]) for key in first)

    sums, steps = engine._start_sums, []
    monkeypatch.setattr(engine, "_start_sums", lambda *args: (steps.append(1), len(steps) == 7 and os.kill(os.getpid(), signal.SIGTERM),
                                                              sums(*args))[-1])
    listed = arguments(layout, "train", "stopped", "--tensorboard", n_freq_validate=2)
    status, said = fails_here("main.py", *listed)
    assert status == 143
    without = [part for part in listed if part not in ("--val_labels_file", layout / "test.csv")]
    status, said = fails_here("main.py", *without[:6], "--resume", "latest", *without[6:])
    assert status == 2 and "this training began with --val_labels_file" in said
    at = listed.index("--output_dir")
    output = run_here("main.py", *listed[:at], "--resume", "latest", *listed[at:])
    assert logged(output)[1:] == logged(whole)[1:]
    assert curves(output) == shown
    weights = [torch.load(str(weights_of(run)).replace("_final", "_best")) for run in (whole, output)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_validation_and_curves_are_for_training(layout):
    for option in (["--val_labels_file", layout / "test.csv"], ["--tensorboard"]):
        status, said = fails_here("main.py", *arguments(layout, "test", "tested", *option))
        assert status == 2 and f"{option[0]} is for training" in said
