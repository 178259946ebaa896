"""Runs scripts in forks of one process, which share its imports.

A script is a line of standard input: its path and the file for its errors, as JSON. The answer is a line with its exit code.
"""

import json
import os
import runpy
import sys
import traceback

import kdlib.training  # noqa: F401  # with torch, whose import takes longer than most scripts


def run(script: str, errors: str) -> int:
    """Run a script in a fork and return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
