"""Trainings that end early go on as if nothing had been; what is damaged, changed or in use is named."""
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fails_here, run_here, weights_of, write_labels, write_scene

from bench import survival
from util import cli, engine, resume
from util.errors import UserError

SMALL = ["--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=4", "batch_size=3", "n_workers=0", "n_freq_checkpoint=100",
         "precision=fp32"]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    for split, n in (("train", 6), ("test", 3)):
        write_labels(root / f"{split}.csv", write_scene(root, "attic", n, split))
    (root / "two.csv").write_text("".join((root / "train.csv").read_text().splitlines(keepends=True)[:3]))
    run_here("main.py", *training(root, "apr", n_epochs=1))
    [apr] = (root / "apr").glob("*_final.pth")
    apr.rename(root / "apr.pth")
    return root


def training(layout, out, *more, script="main.py", **settings):
    """The arguments of a training."""
    apr = [] if script == "main.py" else [layout / "apr.pth"]
    encoder = ["none"] if script == "main_refine_apr.py" else []
    return ["posenet", "train", "none", layout, layout / "train.csv", ROOT / "config.json", *apr, *encoder, "--output_dir", layout / out,
            *more, *SMALL, *(f"{key}={value}" for key, value in settings.items())]


@pytest.fixture
def interrupt(monkeypatch):
    """Run a training in this process that gets a signal in its n-th step; returns its exit status and its last words."""
    def run(script, arguments, at_step, signum=signal.SIGTERM):
        sums, steps = engine._start_sums, []

        def count(*args):
            steps.append(1)
            if len(steps) == at_step:
                os.kill(os.getpid(), signum)
            return sums(*args)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_start_sums", count)
            return fails_here(script, *arguments)
    return run


@pytest.mark.parametrize("script, settings", [
    ("main.py", {"average_last": 0.5}),
    # Of two frames alone: a CPU without bf16 takes long for each.
    ("main.py", {"batch_size": 1, "precision": "bf16", "learnable": "false", "s_x": 1, "s_q": 1, "lr_scheduler_step_size": 1, "average_last": 0}),
    ("main_learn_pose_encoding.py", {"average_last": 0.5}),
    ("main_refine_apr.py", {}),
])
def test_a_training_that_is_stopped_goes_on_to_the_same_weights(layout, interrupt, script, settings):
    out = f"stopped-{script}-{len(settings)}"
    command = training(layout, out, script=script, **settings)
    if "batch_size" in settings:
        command[4] = layout / "two.csv"
    whole = weights_of(run_here(script, *command, "--output_dir", layout / "whole"))
    # In the first epoch, where nothing is saved; then in the second one's and in the last one's first step.
    status, said = interrupt(script, command, 1, signal.SIGINT)
    assert status == 130 and said == f"{script}: stopped by SIGINT; no whole epoch is saved: start it again"
    status, said = interrupt(script, command, 3)
    told = re.fullmatch(rf"{script}: stopped by SIGTERM; it is saved up to epoch 1; go on with: python \S+/{script} (.*)", said)
    assert status == 143 and told, said
    status, said = interrupt(script, shlex.split(told[1]), 5)
    assert status == 143 and re.search("it is saved up to epoch [23];", said)
    again = re.search(rf"go on with: python \S+/{script} (.*)", said)[1]
    assert again == told[1]  # one --resume, however often
    output = run_here(script, *shlex.split(again))
    assert re.search(r"^Going on after epoch [23]$", output, flags=re.MULTILINE)
    first, second = torch.load(whole), torch.load(weights_of(output))
    assert all(torch.equal(first[key], second[key]) for key in first)
    left = {path.name.split("_", 6)[-1] for path in weights_of(output).parent.glob("*.p*")}
    assert not any("resume" in name or name.endswith(".part") for name in left)
    [log] = [path for path in weights_of(output).parent.glob("*.log") if "Going on" in path.read_text()]
    assert log.read_text().count("Command: ") == 3 and weights_of(output).name.startswith(log.stem)


@pytest.fixture
def stopped(layout, interrupt, request):
    """A training of four epochs that was stopped in the fourth, with two states: its folder's name."""
    out = re.sub(r"\W", "_", request.node.name)
    interrupt("main.py", training(layout, out), 3)
    interrupt("main.py", training(layout, out, "--resume", "latest"), 3)  # the first epoch after going on is always saved
    assert len(list((layout / out).glob("*_resume-*.pth"))) == 2
    return out


def newest_first(layout, out):
    return sorted((layout / out).glob("*_resume-*.pth"), reverse=True)


def test_what_would_change_the_result_is_refused_unless_it_is_asked_for(layout, stopped):
    def refused(*more, **settings):
        status, said = fails_here("main.py", *training(layout, stopped, "--resume", "latest", *more, **settings))
        assert status == 2
        return said

    # A setting that --set names is as one wants it; one that comes from the config file or a preset is not.
    said = refused("--preset", "7Scenes")
    assert "s_x was -3.0 and is 0.0 now, s_q was -6.5 and is -3.0 now; give" in said and "name each with --set" in said
    assert "the seed was 0 and is 5 now" in refused("--seed", "5")
    assert "this training began without --checkpoint_path" in refused("--checkpoint_path", layout / "apr.pth")
    labels = (layout / "train.csv").read_text()
    try:
        (layout / "train.csv").write_text(labels.replace("seq-train,attic", "seq-other,attic", 1))
        assert "the content of the labels file is not what it was" in refused()
    finally:
        (layout / "train.csv").write_text(labels)
    assert len(newest_first(layout, stopped)) == 2
    output = run_here("main.py", *training(layout, stopped, "--resume", "latest", n_epochs=3, lr=1e-5, n_workers=1))
    assert "Going on after epoch 2" in output and "/Epoch-3]" in output and "/Epoch-4]" not in output


def test_an_average_that_begins_elsewhere_is_taken_anew(layout, interrupt):
    command = training(layout, "averaged", n_epochs=4, average_last=0.9)
    interrupt("main.py", command, 3)
    longer = weights_of(run_here("main.py", *training(layout, "averaged", "--resume", "latest", n_epochs=6, average_last=0.3)))
    whole = weights_of(run_here("main.py", *training(layout, "whole", n_epochs=6, average_last=0.3)))
    first, second = torch.load(whole), torch.load(longer)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_average_that_begins_before_the_steps_that_are_left_goes_on(layout, interrupt):
    interrupt("main.py", training(layout, "late", average_last=0.1), 5)
    shutil.copytree(layout / "late", layout / "later")
    again = {"average_last": 0.9, "n_epochs": 6}
    at_once = weights_of(run_here("main.py", *training(layout, "late", "--resume", "latest", **again)))
    interrupt("main.py", training(layout, "later", "--resume", "latest", **again), 3)
    _, said = interrupt("main.py", training(layout, "later", "--resume", "latest", **again), 3)
    assert re.search("it is saved up to epoch [34]", said)  # in the second process averaging has begun, not where it would have
    twice = weights_of(run_here("main.py", *training(layout, "later", "--resume", "latest", **again)))
    first, second = torch.load(at_once), torch.load(twice)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_damaged_state_is_named_and_the_one_before_it_taken(layout, stopped):
    newest, before = newest_first(layout, stopped)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # among the numbers, where PyTorch does not look
    newest.write_bytes(content)
    command = training(layout, stopped, "--resume", "latest")
    earlier = before.read_bytes()
    before.write_bytes(earlier[:5000])
    status, said = fails_here("main.py", *command)
    assert status == 2 and f"{newest}: not a readable" in said and "is damaged" in said and "no other state" in said
    before.write_bytes(earlier)
    output = run_here("main.py", *command)
    assert not newest.exists() and f"{newest}: " in output and "going on from the state before it" in output and "Going on after epoch 1" in output
    whole = weights_of(run_here("main.py", *training(layout, "whole")))
    first, second = torch.load(whole), torch.load(weights_of(output))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_is_found_by_its_stamp_and_one_that_cannot_go_on_is_named(layout, stopped):
    def refused(run, out=stopped, script="main.py"):
        status, said = fails_here(script, *training(layout, out, "--resume", run, script=script))
        assert status == 2
        return said

    stamp = newest_first(layout, stopped)[0].name.split("_resume-")[0].removeprefix("run_")
    assert "neither 'latest' nor a stamp" in refused("yesterday")
    assert "has no training of that stamp" in refused("01_01_99_00_00")
    assert "has no unfinished training" in refused("latest", out="nothing")
    assert "has no unfinished training" in refused("latest", script="main_learn_pose_encoding.py")
    held = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
                             "print('locked', flush=True); time.sleep(60)", layout / stopped / f"run_{stamp}.log"], stdout=subprocess.PIPE)
    try:
        held.stdout.readline()
        assert "this training is running" in refused(stamp)
    finally:
        held.kill()
        held.wait()
    output = run_here("main.py", *training(layout, stopped, "--resume", f"run_{stamp}"))
    assert weights_of(output).name == f"run_{stamp}_final.pth"
    assert f"this training is finished, its weights are {weights_of(output)}" in refused(stamp)
    status, said = fails_here("main.py", *training(layout, stopped)[:1], "test", *training(layout, stopped, "--resume", "latest")[2:])
    assert status == 2 and "--resume is for training" in said


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(layout, stopped, monkeypatch):
    sums, steps, model = engine._start_sums, [], []
    monkeypatch.setattr(engine, "_start_sums", lambda loss, *args: steps.append(1) or sums(loss * (float("nan") if len(steps) == 2 else 1), *args))
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **kwargs: model.append(parameters) or adam(parameters, **kwargs))
    before = newest_first(layout, stopped)
    status, said = fails_here("main.py", *training(layout, stopped, "--resume", "latest", batch_size=6, average_last=0))
    assert status == 2 and "batch 1 of epoch 4: the loss is nan; frames: rows 2, 3, 4, 5, 6, 7 of " in said
    assert "it is saved up to epoch 3; go on with: " in said and "smaller lr" in said
    state = torch.load(newest_first(layout, stopped)[0])
    assert state["epoch"] == 3 and newest_first(layout, stopped) != before
    assert all(torch.equal(saved, now) for saved, now in zip([v for k, v in state["weights"].items() if "running" not in k and "tracked" not in k],
                                                             model[0]))
    assert not list((layout / stopped).glob("*_final*"))


def test_the_frame_that_makes_a_loss_infinite_is_named(layout):
    labels = (layout / "train.csv").read_text().splitlines()
    cells = labels[4].split(",")
    labels[4] = ",".join([*cells[:4], "1e25", *cells[5:]])
    (layout / "far.csv").write_text("\n".join(labels) + "\n")
    command = training(layout, "far", batch_size=6)
    command[4] = layout / "far.csv"
    status, said = fails_here("main.py", *command)
    assert status == 2 and f"batch 1 of epoch 1: the loss is inf; frames: rows 5 of {layout / 'far.csv'}" in said


def test_a_frame_that_cannot_be_decoded_midway_is_named(layout, monkeypatch):
    whole = weights_of(run_here("main.py", *training(layout, "whole")))
    frame, write = layout / "attic/seq-train/frame-000003.color.png", resume.write
    content = frame.read_bytes()
    monkeypatch.setattr(resume, "write", lambda prefix, state: (write(prefix, state), frame.write_bytes(content[:3000])))
    for n_workers in (0, 1):
        frame.write_bytes(content)
        status, said = fails_here("main.py", *training(layout, f"midway-{n_workers}", cache_memory_gb=0, n_workers=n_workers))
        assert status == 2 and f"{layout / 'train.csv'}: row 5: image {frame} cannot be read" in said
    frame.write_bytes(content)
    monkeypatch.undo()
    output = run_here("main.py", *training(layout, "midway-0", "--resume", "latest"))
    first, second = torch.load(whole), torch.load(weights_of(output))
    assert "Going on after epoch 1" in output and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def small_files():
    """A limit on the size of files, as a full disk: set it, and it ends with the test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if n_bytes is None else n_bytes, limits[1]))
    yield set_limit
    set_limit(None)


def test_a_full_disk_ends_a_run_in_one_line_and_spoils_nothing(layout, stopped, small_files):
    def full(limit, *command):
        files = {path: path.read_bytes() for path in layout.rglob("*") if path.is_file() and path.suffix != ".log"}
        small_files(limit)
        status, said = fails_here("main.py", *command)
        small_files(None)
        assert status == 2 and said.endswith("cannot be written: File too large")
        assert {path: path.read_bytes() for path in layout.rglob("*") if path.is_file() and path.suffix != ".log"} == files
        return said

    resumed = training(layout, stopped, "--resume", "latest")
    assert "_resume-3.pth: " in full(2 ** 20, *resumed)  # a save
    cached = training(layout, "cached", "--cache_dir", layout / "cache")
    run_here("main.py", *cached)
    os.utime(layout / "attic/seq-train/frame-000000.color.png")
    assert f"{layout / 'cache'}/" in full(2 ** 18, *cached)  # a cache
    tested = ["posenet", "test", *training(layout, "tested", "--checkpoint_path", layout / "apr.pth", "--predictions_path", layout / "p.csv")[2:]]
    run_here("main.py", *tested)
    (layout / "many.csv").write_text((layout / "train.csv").read_text() + (layout / "train.csv").read_text().split("\n", 1)[1] * 40)
    tested[4] = layout / "many.csv"
    assert f"{layout / 'p.csv'}: " in full(2 ** 15, *tested)  # predictions, longer than the log
    assert f"{layout / 'tested'}/run_" in full(2 ** 13, *tested)  # the log
    output = run_here("main.py", *resumed)  # there is room again
    assert "Going on after epoch" in output and weights_of(output).is_file()


@pytest.fixture
def few_files():
    """A limit on open files, beyond those that are open now: set it, and it ends with the test."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + n, limits[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_many_batches_of_workers_need_few_open_files(layout, few_files):
    (layout / "long.csv").write_text((layout / "train.csv").read_text() + (layout / "train.csv").read_text().split("\n", 1)[1] * 7)
    for script in ("main.py", "main_learn_pose_encoding.py"):  # whose teacher's pass keeps every frame's pose
        command = training(layout, "long", script=script, n_workers=1, batch_size=1, test_batch_size=1, n_epochs=1, average_last=0)
        command[4] = layout / "long.csv"
        few_files(40)  # a batch has four tensors, each a file
        weights_of(run_here(script, *command))


def test_workers_do_not_take_the_last_open_files(layout, few_files):
    few_files(15)  # for less than a worker
    output = run_here("main.py", "posenet", "test", *training(layout, "few", "--checkpoint_path", layout / "apr.pth", n_workers=1)[2:])
    assert "\nMedian pose error: " in output


def test_too_many_open_files_are_one_line(few_files, capsys):
    opened = []
    few_files(5)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(10)))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: too many open files for a process here: allow more (ulimit -n 1024), or take fewer "
                                            "workers (--set n_workers=0)\n")


def test_tensorboard_without_room_ends_in_one_line(tmp_path, small_files, capfd):
    run = SimpleNamespace(args=SimpleNamespace(tensorboard=True), prefix=str(tmp_path / "run"))
    for limit, words in ((2000, "File too large"), (None, "File exists")):
        with pytest.raises(UserError, match=f"run_tensorboard: cannot be written: {words}"), engine._tensorboard(run, SimpleNamespace(curves=[])) as board:
            small_files(limit)
            board([500, 1e-3, 0.5, 0.1, 1.0, 0.1, 1.0], [0.5] * 500)
        small_files(None)
        assert not capfd.readouterr().err
        shutil.rmtree(tmp_path / "run_tensorboard", ignore_errors=True)
        (tmp_path / "run_tensorboard").touch()


def test_a_run_outlives_its_screen(layout):
    command = [ROOT / "main.py", "posenet", "test", *training(layout, "alone", "--checkpoint_path", layout / "apr.pth")[2:]]
    process = subprocess.run(f"{shlex.join([sys.executable, *map(str, command)])} | head -n 1", shell=True, capture_output=True, text=True)
    assert process.stdout == "Start posenet with test\n" and not process.stderr
    [log] = (layout / "alone").glob("*.log")
    assert "Recall at 5 m/10 deg" in log.read_text()


def test_an_interrupted_test_ends_in_one_line(layout, monkeypatch):
    monkeypatch.setattr(engine, "milliseconds", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    status, said = fails_here("main.py", "posenet", "test", *training(layout, "tested", "--checkpoint_path", layout / "apr.pth")[2:])
    assert status == 130 and said == "main.py: stopped by SIGINT"


def test_killed_trainings_go_on_to_the_same_weights(tmp_path, layout, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = survival.kills(tmp_path, layout, layout / "train.csv", 1, 8, seed=9)  # in the middle of it
    assert results["SIGKILL"]["while writing"] == 1 and results["SIGTERM"]["ends"] == 1


def test_what_killed_processes_left_is_removed(tmp_path, layout):
    out = layout / "parts"
    out.mkdir()
    old, new, other = (out / f"run_01_01_20_00_00_{name}.part" for name in ("final.pth.0a", "final.pth.0b", "final.pth.0c"))
    for path in (old, new, other):
        path.write_bytes(b"part")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    held = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
                             "print('locked', flush=True); time.sleep(60)", other], stdout=subprocess.PIPE)
    try:
        held.stdout.readline()
        run_here("main.py", *training(layout, "parts", n_epochs=1))
    finally:
        held.kill()
        held.wait()
    # A process may have just begun, or be at, the others.
    assert not old.exists() and new.exists() and other.exists()
