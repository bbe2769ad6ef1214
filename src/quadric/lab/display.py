"""What a person sees while runs are under way: two bars in a terminal, one line a result anywhere else."""

import contextlib
import signal
import types
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Live progress over a known number of steps.

    Args:
        console: Where to print.
        total: Steps of everything that is to be done.
    """

    def __init__(self, console: Console, total: int):
        self.console = console
        self.done = 0
        self.interrupted = False
        # Outside a terminal a bar would be a flood of half-drawn lines: only `say` prints there.
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
            transient=True,
        )
        self.whole = self.bars.add_task("everything", total=total, state="")
        self.current = self.bars.add_task("", total=1, state="", visible=False)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, label: str, steps: int) -> None:
        """Start a run of so many steps."""
        self.bars.update(self.current, description=label, total=steps, completed=0, state="", visible=True)

    def step(self, steps: int, state: str) -> bool:
        """Show that the current run has taken so many steps; True when the person asked to stop."""
        self.bars.update(self.current, completed=steps, state=state)
        self.bars.update(self.whole, completed=self.done + steps)
        return self.interrupted

    def end(self, steps: int) -> None:
        """Finish the current run, which was to take so many steps and may have stopped early."""
        self.done += steps
        self.bars.update(self.whole, completed=self.done)
        self.bars.update(self.current, visible=False)

    @contextlib.contextmanager
    def live(self) -> Iterator["Display"]:
        """Show the bars; meanwhile Ctrl-C (or SIGTERM) waits for the end of a step, a second one does not."""

        def ask(number: int, frame: types.FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.bars:
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
