"""The command line in the process of a test."""

import torch

from quadric.lab.cli import run


def command_line(folder, monkeypatch, capsys):
    """A function of the words of a command, run in a folder: its status, what it said, what it complained."""
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()

    def call(*words):
        status = run(words)
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
