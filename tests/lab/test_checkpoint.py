import errno
import os
import random

import pytest
import torch

from quadric.lab import LabError, checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "run.pt"
    checkpoint.save(path, {"x": torch.arange(3), "list": [1, 2.5, None, "a"]})
    state = checkpoint.load(path)
    assert torch.equal(state["x"], torch.arange(3))
    assert state["list"] == [1, 2.5, None, "a"]
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_truncated_or_damaged_is_one_sentence(tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"x": torch.randn(500)})
    whole = path.read_bytes()
    rng = random.Random(0)
    cuts = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    # A bit of the tensor itself: torch alone would load it without a word.
    place = whole.index(checkpoint.load(path)["x"].numpy().tobytes()) + rng.randrange(2000)
    cuts.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for content in cuts:
        path.write_bytes(content)
        with pytest.raises(
            LabError, match=r"truncated or damaged; delete it and repeat with --resume to start this run again"
        ):
            checkpoint.load(path)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(LabError, match="not a checkpoint of this version of quadric"):
        checkpoint.load(path)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"format": checkpoint.FORMAT, "bomb": Bomb()}, path)
    with pytest.raises(LabError, match="truncated or damaged"):
        checkpoint.load(path)
    with pytest.raises(LabError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_last_good_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"x": torch.zeros(3)})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "write":
        # A device that is always full, behind the file object that torch's own writer calls.
        (tmp_path / ".run.pt.draft").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (type(path), "replace")}[moment], full)
    with pytest.raises(LabError, match=r"previous one is untouched\); the disk is full: free some space, then") as info:
        checkpoint.save(path, {"x": torch.ones(100_000)})
    assert info.value.code == 1
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)["x"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"cannot write .*file/run.pt"):
        checkpoint.save(tmp_path / "file" / "run.pt", {})


def test_a_disk_that_turned_read_only_is_one_sentence_and_not_the_failure_to_clean_up(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink"):
        monkeypatch.setattr(type(tmp_path), name, refuse)
    with pytest.raises(LabError, match=r"disk is read-only: choose another --out, or make it writable and repeat with"):
        checkpoint.save(tmp_path / "run.pt", {})


def test_programming_errors_are_not_hidden(tmp_path):
    with pytest.raises(RuntimeError, match="mine"):
        checkpoint.write_atomically(tmp_path / "a", lambda file: (_ for _ in ()).throw(RuntimeError("mine")))
    assert [p.name for p in tmp_path.iterdir()] == []


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": [float("nan"), float("inf"), 1.5], "b": (True, None)})
    assert checkpoint.read_json(path) == {"a": [None, None, 1.5], "b": [True, None]}
    path.write_text('{"a": ')
    with pytest.raises(LabError, match="delete it and repeat with --resume"):
        checkpoint.read_json(path)
    for text in ("[]", "null", "{}"):
        path.write_text(text)
        with pytest.raises(LabError, match=r"is not what quadric wrote there; choose another --out"):
            checkpoint.read_json(path, "history", remedy="choose another --out")
