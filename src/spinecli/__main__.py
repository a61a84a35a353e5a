"""`spine`, and `python -m spinecli`."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C ends it in a word also while it is being loaded."""
    try:
        from spinecli.app import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("error: Stopped.\n")
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
