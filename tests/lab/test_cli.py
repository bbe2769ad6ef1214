import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import command_line
from safetensors.torch import load_file

from quadric.lab.models import MODELS
from quadric.lab.optimizers import ENTRANTS
from quadric.lab.tasks import TASKS

SMALL = ("--examples", "300", "--epochs", "2")


@pytest.fixture
def quadric(tmp_path, monkeypatch, capsys):
    return command_line(tmp_path, monkeypatch, capsys)


def history(folder):
    results = json.loads((folder / "results.json").read_text())
    return [
        (r["step"], r["lr"], r["train_loss"], r["test_loss"], r["test_metric"])
        for entrant in results["entrants"]
        for run in entrant["runs"]
        for r in run["history"]
    ]


def test_help_has_examples_and_names_everything(quadric):
    for command in ("race", "train"):
        status, out, err = quadric(command, "--help")
        assert (status, err) == (0, "")
        words = " ".join(out.split())
        assert f"Examples: quadric {command}" in words
        for option in ("--seed", "--device", "--out", "--resume", "--task", "--model", "--data-dir", "--set"):
            assert option in words
        together = out.replace(" ", "").replace("\n", "")
        for name in (*TASKS, *MODELS, *ENTRANTS):
            assert name in together
    assert quadric()[1] == quadric("--help")[1]
    assert quadric("--version")[1].startswith("quadric 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?; see quadric --help"),
        ("race --task nope", "there is no task 'nope'; choose one of digits"),
        ("race --optimizers sgd,adam", "there is no optimizer 'adam'; choose from sgd"),
        ("race --optimizers sgd,sgd", "--optimizers takes different names"),
        ("race --optimizers ,", "--optimizers takes different names"),
        ("race --model vgg", "there is no model 'vgg'"),
        ("race --model gpt", "gpt takes text inputs"),
        ("race --epochs -1", "'--epochs'"),
        ("race --epochs two", "; see quadric race --help"),
        ("race --batch-size 0", "'--batch-size'"),
        ("race --examples 5000", "has 1437 training examples"),
        ("race --seeds 0", "--seeds takes a number of seeds"),
        ("race --seeds 1,1", "--seeds takes a number of seeds"),
        ("race --seeds a", "--seeds takes a number of seeds"),
        ("race --seed -1", "'--seed'"),
        ("race --lr-range 0 1", "--lr-range takes two positive rates"),
        ("race --lr-range 1 0.1", "--lr-range takes two positive rates"),
        ("race --lr-range 1 1", "has room for 1 rates; use --tune 1 or a wider range"),
        ("race --tune -1", "'--tune'"),
        ("race --tune two", "'--tune'"),
        ("race --tune 400", "has room for 310 rates"),
        ("race --threads 100000", "cores; give at most"),
        ("race --target nan", "--target must be a finite number, not nan"),
        ("race --seed 4294967296", "'--seed'"),
        ("race --seeds 0,4294967296", "--seeds takes a number of seeds"),
        (
            "race --set adamw.betas=(0.9,)",
            "adamw cannot be built (tuple index out of range); change --set adamw.betas=",
        ),
        ("race --set sgd.momentum=fast", "change --set sgd.momentum=fast"),
        ("race --set sgd.lr=0.1", "add --tune 0 or leave it out"),
        ("race --tune 0 --set sgd.lr=0", "--set sgd.lr must be a positive number, not 0"),
        ("race --tune 0 --set sgd.lr=fast", "--set sgd.lr must be a positive number, not fast"),
        ("race --set mfac.windw=3", "mfac has no 'windw'"),
        ("race --set mfac.window=-3", "mfac cannot be built"),
        ("race --device tpu", "'--device'"),
        ("race --data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("race --task mnist --data-dir .", "there is no mnist.npz in ."),
        ("race --text nowhere.txt", "there is no nowhere.txt"),
        ("race --schedule linear", "'--schedule'"),
        ("race --bogus", "No such option: --bogus"),
        ("race --augment --task regression", "needs --data-dir"),
        ("race --augment --task digits-autoencoder", "--augment is for images with labels, and digits-autoencoder"),
        ("race --model autoencoder", "or --task digits-autoencoder"),
        ("race --resume", "there is nothing to resume in runs/race-digits-mlp"),
        ("train --optimizer adam", "there is no optimizer 'adam'"),
        ("train --lr 0", "--lr must be a positive number, not 0.0"),
        ("train --lr -1", "--lr must be a positive number, not -1"),
        ("train --lr nan", "--lr must be a positive number, not nan"),
        ("train --resume --out nowhere", "there is nothing to resume in nowhere; start it without --resume"),
    ],
)
def test_bad_values_are_one_line_and_status_2(quadric, tmp_path, words, message):
    status, out, err = quadric(*words.split())
    assert status == 2
    assert out == ""
    assert err.startswith("quadric: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(quadric):
    status, _, err = quadric("train", "--device", "cuda")
    assert (status, err.count("\n")) == (2, 1)
    assert "--device cuda: torch sees no CUDA device here; use --device cpu or auto" in err


def test_folders_are_never_overwritten(quadric, tmp_path):
    words = ("train", "--optimizer", "sgd", *SMALL)
    assert quadric(*words, "--out", "a")[0] == 0
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    status, _, err = quadric(*words, "--out", "a")
    assert status == 2
    assert "a holds this train already; add --resume to continue it or choose another --out" in err
    status, _, err = quadric(*words, "--lr", "0.5", "--out", "a", "--resume")
    assert status == 2
    assert 'a was started with another configuration (settings {"sgd": {}}, now {"sgd": {"lr": 0.5}})' in err
    status, _, err = quadric("race", *SMALL, "--out", "a")
    assert status == 2
    assert "another configuration" in err
    assert (tmp_path / "a" / "checkpoint.pt").read_bytes() == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    status, _, err = quadric(*words, "--out", "mine")
    assert status == 2
    assert "mine exists and is not a run's folder; choose another --out" in err

    status, _, err = quadric(*words, "--out", "mine/thesis.tex/run")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot make the folder mine/thesis.tex/run (Not a directory); choose another --out" in err

    for name in ("train-digits-mlp", "train-digits-mlp-2"):
        assert quadric(*words)[0] == 0
        assert (tmp_path / "runs" / name / "results.json").exists()
    assert quadric(*words, "--resume")[1].endswith("saved: runs/train-digits-mlp-2\n")


def test_resume_remembers_the_options(quadric, tmp_path):
    assert quadric("train", "--optimizer", "adamw", *SMALL, "--seed", "7", "--out", "a")[0] == 0
    before = history(tmp_path / "a")
    (tmp_path / "a" / "results.json").unlink()
    status, out, _ = quadric("train", "--out", "a", "--resume")
    assert status == 0
    assert history(tmp_path / "a") == before
    assert "adamw, seed 7" in out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arguments": 3}', '{"arguments": [3]}', '{"arguments": ["--x"]}'])
def test_a_broken_configuration_is_one_line(quadric, tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(content)
    status, _, err = quadric("train", "--out", "a", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert err.rstrip().endswith(("choose another --out", "see quadric train --help"))


def test_more_in_a_step_than_there_is_means_all_of_it(quadric, tmp_path):
    assert quadric("train", *SMALL, "--optimizer", "sgd", "--batch-size", "1000", "--out", "a")[0] == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (results["batch_size"], results["steps"]) == (300, 2)


def test_a_broken_checkpoint_is_one_line(quadric, tmp_path):
    assert quadric("train", *SMALL, "--optimizer", "sgd", "--out", "a")[0] == 0
    path = tmp_path / "a" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    status, _, err = quadric("train", "--out", "a", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert "a/checkpoint.pt is truncated or damaged; delete it and repeat with --resume to start this run again" in err
    path.unlink()
    assert quadric("train", "--out", "a", "--resume")[0] == 0


def test_a_run_that_diverges_has_status_1_and_keeps_its_results(quadric, tmp_path):
    status, _, err = quadric("train", *SMALL, "--optimizer", "sgd", "--lr", "1e18", "--out", "a")
    assert (status, err.count("\n")) == (1, 1)
    assert "sgd, seed 0: diverged after step 1" in err
    assert json.loads((tmp_path / "a" / "results.json").read_text())["entrants"][0]["runs"][0]["diverged"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SystemExit(1), 1, "quadric: error: who read the output has left; continue with: quadric train"),
        (BrokenPipeError(), 1, "quadric: error: who read the output has left; continue with: quadric train"),
        (
            OSError(28, "No space left on device"),
            1,
            "the system refuses ([Errno 28] No space left on device); put that",
        ),
        (MemoryError(), 1, "the memory is used up; try a smaller --batch-size, model or window"),
    ],
)
def test_output_that_nobody_takes_and_a_machine_that_refuses_are_one_sentence(
    quadric, monkeypatch, error, status, message
):
    def refuse(self, line):
        raise error

    monkeypatch.setattr("quadric.lab.display.Display.say", refuse)
    monkeypatch.setattr("quadric.lab.cli._give_up_stdout", lambda: None)
    given, _, err = quadric("train", *SMALL, "--optimizer", "sgd", "--model", "logistic")
    assert (given, err.count("\n")) == (status, 1)
    assert message in err


def test_tune_may_stand_alone(quadric, tmp_path):
    words = ("race", *SMALL, "--optimizers", "sgd", "--seeds", "1", "--model", "logistic", "--tune-epochs", "1")
    assert quadric(*words, "--out", "a", "--tune")[0] == 0
    grid = json.loads((tmp_path / "a" / "results.json").read_text())["tuning"]["grid"]
    assert grid == [1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1, 1.0]
    status, out, _ = quadric(*words, "--out", "b", "--tune", "2", "--lr-range", "0.01", "0.1")
    assert status == 0
    assert json.loads((tmp_path / "b" / "results.json").read_text())["tuning"]["grid"] == [0.01, 0.1]
    assert out.endswith("report: b/report.html\n")
    assert (tmp_path / "b" / "report.html").exists()


def test_threads(quadric, tmp_path):
    words = ("train", "--optimizer", "sgd", "--model", "logistic", *SMALL)
    cores = os.cpu_count()
    for given, threads in (((), 1), (("--threads", f"{cores}"), cores)):
        assert quadric(*words, *given, "--out", str(threads))[0] == 0
        results = json.loads((tmp_path / str(threads) / "results.json").read_text())
        assert results["environment"]["threads"] == threads


def test_other_tasks_from_the_command_line(quadric, tmp_path):
    (tmp_path / "song.txt").write_text("row, row, row your boat, gently down the stream. " * 60)
    status, out, err = quadric("train", "--text", "song.txt", "--optimizer", "adamw", "--epochs", "1", "--out", "a")
    assert (status, err) == (0, "")
    assert "bits per character" in out


def command(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "quadric.lab", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_and_resume_ends_with_the_same_bits(quadric, tmp_path):
    words = ("train", "--optimizer", "mfac", "--set", "mfac.window=16", "--epochs", "12", "--checkpoint-steps", "1")
    assert quadric(*words, "--out", "whole")[0] == 0
    checkpoint, arguments = tmp_path / "cut" / "checkpoint.pt", (*words, "--out", "cut")
    for delay in (0.02, 0.05):  # anywhere: in a step, in an evaluation, in a write
        process, before = command(tmp_path, *arguments), time.time()
        wait_for(lambda since=before: checkpoint.exists() and checkpoint.stat().st_mtime > since, process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        arguments = ("train", "--out", "cut", "--resume")
    assert quadric(*arguments)[0] == 0
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key])


def test_ctrl_c_says_how_to_continue_and_a_killed_race_continues(quadric, tmp_path):
    words = ("--optimizers", "sgd,adamw", "--model", "logistic", "--epochs", "40", "--tune", "0", "--seeds", "3")
    process = command(tmp_path, "race", *words)
    folder = tmp_path / "runs" / "race-digits-logistic"
    wait_for(lambda: len(list(folder.glob("runs/*.json"))) >= 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert err.startswith("quadric: interrupted; continue with: quadric race --optimizers sgd,adamw")
    assert err.endswith("--out runs/race-digits-logistic --resume\n")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*.json")}
    assert 0 < len(finished) < 6
    status, out, err = quadric("race", "--out", "runs/race-digits-logistic", "--resume")
    assert (status, err) == (0, "")
    assert len(list(folder.glob("runs/*.json"))) == 6
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "report: runs/race-digits-logistic/report.html" in out


def test_without_the_lab_extra_one_sentence():
    script = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'typer' else real(name, *rest)\n"
        "from quadric.lab.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "quadric: error: the command line needs typer; run: pip install 'quadric[lab]'\n"
