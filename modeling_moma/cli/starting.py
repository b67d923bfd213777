# SPDX-License-Identifier: Apache-2.0
"""Whether Python was started to run the command `moma`, whose help needs neither torch nor Transformers."""

import os
import sys


PACKAGE, COMMANDS = "modeling_moma", ("moma", "moma.exe")


def starts_command() -> bool:
    """Return whether this process is at the beginning of `moma ...` or `python -m modeling_moma ...`.

    It is no longer once the command has taken its arguments, nor in processes that the command starts.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    # `sys.argv` begins like this while Python imports the package in which it looks for `__main__`
    if program == "-m":
        return sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == [PACKAGE] if "-m" in sys.orig_argv else False
    if os.path.basename(program) not in COMMANDS or not os.path.isfile(program):
        return False
    # a process that the command spawns runs the script again, and no `main` of it
    if program not in sys.orig_argv:
        return False
    # an installer of tools links to the script from elsewhere
    folder = os.path.dirname(os.path.realpath(program))
    return os.path.samefile(folder, os.path.dirname(sys.executable))
