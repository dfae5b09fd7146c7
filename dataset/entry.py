"""Lets `python FOLDER/NAME.py` do what `python -m FOLDER.NAME` does, from anywhere.

Python puts the folder of a script on its import path, and the project's modules are one above it.
"""

import os
import sys
from pathlib import Path


def restart_as_module(file: str) -> None:
    """Replace this process by `python -m FOLDER.NAME` with the same arguments."""
    script = Path(file).resolve()
    command = [sys.executable, "-m", f"{script.parent.name}.{script.stem}", *sys.argv[1:]]
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Safe path: another folder of that name in the user's folder must not be taken for this one.
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, command, os.environ | more)
