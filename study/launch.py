"""The entry: `python study/launch.py ablation`. A path shim only; the commands are in `study/cli.py`."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script, Python puts study/ on the path instead of the project's root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from study.cli import main

if __name__ == "__main__":
    main()
