"""``python -m cnclip_ft.launch``: torchrun with its arguments, which exits with 130 where the run was stopped on request.

torchrun itself exits with 1 then, as for a run that failed, and shows a traceback.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

STOPPED = 130


def main() -> None:
    """Start the processes that the arguments ask for, and wait for them."""
    try:
        torchrun()
    except SignalException:  # passed on to the processes, which had 30 seconds
        sys.exit(STOPPED)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if STOPPED in codes:
            sys.exit(STOPPED)
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
