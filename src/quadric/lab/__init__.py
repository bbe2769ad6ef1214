"""Tasks, one training loop, races and reports: where quadric's optimizers meet real data.

Everything here needs ``pip install quadric[lab]``; nothing in the core imports it.
"""


class LabError(Exception):
    """One sentence for the person at the terminal: what is wrong, then the remedy. The command line prints it and ends.

    Args:
        message: The sentence.
        code: Exit status of the command: 2 for a value that cannot be used, 1 where the machine failed (a full disk).
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code
