"""Script that forks a `compress` process for each line of standard input, so that libraries are imported only once.

A line is JSON with the arguments and two files, for standard output and error; the response is the exit code.
"""

from __future__ import annotations

import json
import os
import sys

import forked_from  # noqa: F401

for line in sys.stdin:
    arguments, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["compress", *arguments]
        from compress.cli import main

        main()
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    sys.stdout.flush()
