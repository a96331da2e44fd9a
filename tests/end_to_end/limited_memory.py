"""The command line in a process that may take only so much more memory than it has when all libraries are loaded.

python tests/end_to_end/limited_memory.py MEGABYTES STUDY [OPTIONS]
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def main(megabytes: int) -> None:
    """Load what a run loads, set the limit, run."""
    import mlflow  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    from transformers.models.dinov2 import modeling_dinov2  # noqa: F401

    from study import cli, driver  # noqa: F401

    torch.set_num_threads(1)  # every thread takes address space
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cli.main()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    del sys.argv[0]
    main(int(sys.argv[0]))
