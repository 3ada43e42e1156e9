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

from conftest import REWARD, SMALL, TASK, Dot, contents

from llm import LLM
from run import Run
from selfalign import Config, train, update_theta
from standin import StandIn


def small_run(folder: Path) -> None:
    run = Run(folder, resume=(folder / "settings.json").exists())
    c = Config(**{**SMALL, "workers": True, "proposal": str(folder.parent / "r.py")})
    train(Dot, TASK, LLM(StandIn(), folder / "llm.jsonl"), run, c, update_theta)


def start(folder: Path) -> int:
    """The number of a process that begins or resumes the run in a folder, in silence."""
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        small_run(folder)
        os._exit(0)
    return number


def main(kills: int) -> None:
    rng, done, runs, wrong = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        (here / "r.py").write_text(REWARD)
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
                for left_over in folder.glob("*"):
                    if not (folder / "settings.json").exists() and left_over.is_file():
                        left_over.unlink()  # killed before there was anything to resume
            runs += 1
            same = status == 0 and contents(folder) == contents(here / "whole")
            wrong += not same
            print(f"{done} kills in {runs} runs; {wrong} ended otherwise", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]))
