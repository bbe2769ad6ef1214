"""``quadric`` and ``python -m quadric.lab``."""

import importlib.util
import sys

NEEDED = ("typer", "rich", "matplotlib", "sklearn", "safetensors", "tensorboard")


def main() -> None:
    """Run the command line; without the lab extra, say how to get it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"quadric: error: the command line needs {', '.join(missing)}; run: pip install 'quadric[lab]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from quadric.lab.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
