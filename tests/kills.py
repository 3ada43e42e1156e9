"""Kills small runs at random moments, resumes them, and compares them with one left alone.

    python tests/kills.py 60

No test: each kill takes some seconds. Exits with 1 if a run does not end like its whole twin.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import contents, live


def start(folder: Path) -> int:
    """The number of a process that begins or resumes the run in a folder, in silence."""
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        live(folder, workers=True)
        os._exit(0)
    return number


def main(kills: int) -> None:
    rng, done, runs, wrong = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        started = time.monotonic()
        os.waitpid(start(here / "whole"), 0)
        takes = time.monotonic() - started
        while done < kills:
            folder, status = here / f"run{runs}", None
            while status is None or os.WIFSIGNALED(status):
                number = start(folder)
                time.sleep(rng.uniform(0, takes))
                os.kill(number, signal.SIGKILL)
                status = os.waitpid(number, 0)[1]
                done += os.WIFSIGNALED(status)
            runs += 1
            same = status == 0 and contents(folder) == contents(here / "whole")
            wrong += not same
            print(f"{done} kills in {runs} runs; {wrong} ended otherwise", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]))
