"""`python -m cnclip_ft`: the command, without the working folder on the search path."""

import os
import sys

# `python -m` puts the working folder first on the search path: a folder that was downloaded would be imported from, for
# any name. It stays where this very package lies in it (a checkout that is not installed).
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not getattr(sys.flags, "safe_path", False) and os.path.abspath(sys.path[0]) != _ROOT:
    del sys.path[0]

from cnclip_ft.cli import main  # noqa: E402 - after the search path is settled

main()
