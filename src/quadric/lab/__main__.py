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
    try:
        from quadric.lab.cli import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # during the import
        print("quadric: interrupted before anything was saved", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
