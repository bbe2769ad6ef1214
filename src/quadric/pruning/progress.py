"""Progress: what is being done, and the share that is finished."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

__all__ = ["Watch", "watcher"]

Watch = Callable[[str, float], object]


def watcher(progress: bool | Watch) -> Watch:
    """Whom to tell: a bar for True, nobody for False, or the function given."""
    if callable(progress):
        return progress
    return Bar() if progress else lambda what, share: None


class Bar:
    """A bar on stderr: one line that is drawn again in a terminal, a line for each tenth anywhere else."""

    def __init__(self) -> None:
        self.tenth = -1

    def __call__(self, what: str, share: float) -> None:
        terminal, tenth = sys.stderr.isatty(), math.floor(10 * share)
        if share == 0 and what.startswith("memory"):
            print(what, file=sys.stderr)
        elif terminal:
            print(
                f"\r\x1b[K{'█' * round(30 * share):░<30} {100 * share:3.0f} %  {what}",
                end="\n" if share == 1 else "",
                file=sys.stderr,
                flush=True,
            )
        elif tenth > self.tenth:
            self.tenth = tenth
            print(f"{100 * share:3.0f} %  {what}", file=sys.stderr)
