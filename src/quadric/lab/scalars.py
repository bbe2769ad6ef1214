"""A run's history as TensorBoard scalars."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from quadric.lab.checkpoint import refusal


class ScalarLog:
    """An event file that holds each record of a history once, also after a kill.

    What an interrupted run wrote after its last checkpoint would be written again, so the folder's own event files are
    replaced and the history known so far is played back. Records are written here and now, not by SummaryWriter's
    thread, which meets a full disk with a traceback of its own. Relative time in TensorBoard is training seconds.

    Args:
        folder: Where the event file goes.
        history: Records up to here.

    Raises:
        LabError: When the disk or the folder refuses.
    """

    def __init__(self, folder: Path, history: Iterable[Mapping[str, Any]]):
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.quadric"
        self.origin = time.time() - max((record["seconds"] for record in history), default=0.0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        except OSError as error:
            raise refusal(self.path, error) from error
        self._append(Event(wall_time=self.origin, file_version="brain.Event:2"))
        for record in history:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        values = [Summary.Value(tag=key, simple_value=record[key]) for key in record if key not in ("step", "epoch")]
        event = Event(wall_time=self.origin + record["seconds"], step=record["step"], summary=Summary(value=values))
        self._append(event)

    def _append(self, event: Event) -> None:
        try:
            with self.path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise refusal(self.path, error) from error
