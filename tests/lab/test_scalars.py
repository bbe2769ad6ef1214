import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quadric.lab import LabError
from quadric.lab.scalars import ScalarLog

HISTORY = [{"step": 10 * i, "epoch": i, "seconds": 0.5 * i, "train_loss": 1.0 / i} for i in (1, 2, 3)]


def test_records_are_there_once_after_a_resume(tmp_path):
    log = ScalarLog(tmp_path, [])
    for record in HISTORY:
        log.add(record)
    # Killed here; the checkpoint knew two epochs, the third is trained again.
    log = ScalarLog(tmp_path, HISTORY[:2])
    log.add(HISTORY[2])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"seconds", "train_loss"}
    losses = events.Scalars("train_loss")
    assert [event.step for event in losses] == [10, 20, 30]
    assert [event.value for event in losses] == pytest.approx([1, 1 / 2, 1 / 3])
    assert losses[2].wall_time - losses[0].wall_time == pytest.approx(1.0, abs=1e-3)


def test_a_folder_that_refuses_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot write"):
        ScalarLog(tmp_path / "file" / "run", [])
