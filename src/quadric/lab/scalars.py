"""A run's history as TensorBoard scalars."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter


class ScalarLog:
    """Event files that hold each record of a history once, also after a kill.

    What an interrupted run wrote after its last checkpoint would be written again, so the folder's own event files are
    replaced and the history known so far is played back.

    Args:
        folder: Where the event files go.
        history: Records up to here.
    """

    def __init__(self, folder: Path, history: Iterable[Mapping[str, Any]]):
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder))
        for record in history:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and let readers see it.

        Args:
            record: One entry of a history.
        """
        for key, value in record.items():
            if key not in ("step", "epoch"):
                self.writer.add_scalar(key, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        """End the file."""
        self.writer.close()
