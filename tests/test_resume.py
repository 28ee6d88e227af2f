"""A stopped training resumes to the weights of an uninterrupted one; a state that does not fit is named."""
import re
import shlex
import signal

import pytest
from conftest import fails_here, run_here, same_weights, weights_of
from trainings import evaluation, interrupt, locked, states, stop_in_third_epoch, training


@pytest.mark.parametrize("script, labels, settings", [
    ("main.py", "train.csv", {"average_last": 0.5}),
    # Two frames only: without support for bf16 a CPU takes long for each.
    ("main.py", "two.csv", {"batch_size": 1, "precision": "bf16", "learnable": "false", "s_x": 1, "s_q": 1,
                            "lr_scheduler_step_size": 1, "average_last": 0}),
    ("main_learn_pose_encoding.py", "train.csv", {"average_last": 0.5}),
    ("main_refine_apr.py", "train.csv", {}),
])
def test_a_stopped_training_resumes_to_the_weights_of_an_uninterrupted_one(attic, script, labels, settings):
    out = f"stopped-{script}-{len(settings)}"
    command = training(attic, out, script=script, labels=labels, **settings)
    whole = weights_of(run_here(script, *command, "--output_dir", attic / "whole"))
    # Stopped in the first epoch, before anything is saved; then in the second epoch, and at the last one's first step.
    status, message = interrupt(script, command, 1, signal.SIGINT)
    assert status == 130
    assert message == f"{script}: stopped by SIGINT; no whole epoch is saved: start it again"
    status, message = interrupt(script, command, 3)
    advised = re.fullmatch(rf"{script}: stopped by SIGTERM; it is saved up to epoch 1; "
                           rf"resume it with: python \S+/{script} (.*)", message)
    assert status == 143 and advised, message
    status, message = interrupt(script, shlex.split(advised[1]), 5)
    assert status == 143 and re.search("it is saved up to epoch [23];", message)
    again = re.search(rf"resume it with: python \S+/{script} (.*)", message)[1]
    assert again == advised[1]  # one --resume, however often

    output = run_here(script, *shlex.split(again))
    assert re.search(r"^Resuming after epoch [23]$", output, flags=re.MULTILINE)
    resumed = weights_of(output)
    assert same_weights(whole, resumed)
    left = {path.name.split("_", 6)[-1] for path in resumed.parent.glob("*.p*")}
    assert not any("resume" in name or name.endswith(".part") for name in left)
    [log] = [path for path in resumed.parent.glob("*.log") if "Resuming" in path.read_text()]
    assert log.read_text().count("Command: ") == 3 and resumed.name.startswith(log.stem)


def test_resuming_refuses_what_would_change_the_result_unless_set_names_it(attic):
    stop_in_third_epoch(attic, "refusing")

    def refused(*more, **settings):
        status, message = fails_here("main.py", *training(attic, "refusing", "--resume", "latest", *more, **settings))
        assert status == 2
        return message

    # A setting that --set names is meant so; one that comes from the config file or a preset may not be.
    message = refused("--preset", "7Scenes")
    assert "s_x was -3.0 and is 0.0 now, s_q was -6.5 and is -3.0 now" in message
    assert "now; give the settings as they were, or name each with --set" in message
    assert "the seed was 0 and is 5 now" in refused("--seed", "5")
    assert "this training began without --checkpoint_path" in refused("--checkpoint_path", attic / "apr.pth")
    labels = (attic / "train.csv").read_text()
    try:
        (attic / "train.csv").write_text(labels.replace("seq-train,attic", "seq-other,attic", 1))
        assert "the content of the labels file is not what it was" in refused()
    finally:
        (attic / "train.csv").write_text(labels)
    assert len(states(attic / "refusing")) == 2
    output = run_here("main.py", *training(attic, "refusing", "--resume", "latest", n_epochs=3, lr=1e-5, n_workers=1))
    assert "Resuming after epoch 2" in output and "/Epoch-3]" in output and "/Epoch-4]" not in output


def test_a_damaged_state_is_named_and_the_one_before_it_resumed(attic):
    stop_in_third_epoch(attic, "damaged")
    newest, before = states(attic / "damaged")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # among the numbers, where PyTorch does not look
    newest.write_bytes(content)
    command = training(attic, "damaged", "--resume", "latest")
    earlier = before.read_bytes()
    before.write_bytes(earlier[:5000])
    status, message = fails_here("main.py", *command)
    assert status == 2 and f"{newest}: not a readable" in message
    assert "is damaged" in message and "no other state" in message
    before.write_bytes(earlier)
    output = run_here("main.py", *command)
    assert not newest.exists() and f"{newest}: " in output
    assert "resuming from the state before it" in output and "Resuming after epoch 1" in output
    whole = weights_of(run_here("main.py", *training(attic, "whole")))
    assert same_weights(whole, weights_of(output))


def test_a_run_is_found_by_its_stamp_and_one_that_cannot_be_resumed_is_named(attic):
    stop_in_third_epoch(attic, "found")

    def refused(run, out="found", script="main.py"):
        status, message = fails_here(script, *training(attic, out, "--resume", run, script=script))
        assert status == 2
        return message

    stamp = states(attic / "found")[0].name.split("_resume-")[0].removeprefix("run_")
    assert "neither 'latest' nor a stamp" in refused("yesterday")
    assert "has no training of that stamp" in refused("01_01_99_00_00")
    assert "has no unfinished training" in refused("latest", out="nothing")
    assert "has no unfinished training" in refused("latest", script="main_learn_pose_encoding.py")
    with locked(attic / "found" / f"run_{stamp}.log"):
        assert "this training is running" in refused(stamp)
    output = run_here("main.py", *training(attic, "found", "--resume", f"run_{stamp}"))
    assert weights_of(output).name == f"run_{stamp}_final.pth"
    assert f"this training is finished, its weights are {weights_of(output)}" in refused(stamp)
    status, message = fails_here("main.py", *evaluation(attic, "found", "--resume", "latest"))
    assert status == 2 and "--resume is for training" in message
