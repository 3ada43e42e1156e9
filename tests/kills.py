"""Kills small runs at random moments, goes on with them, and compares them with runs that nothing stopped.

    python tests/kills.py 60        # kills of each of selfalign, fixed and sparse

No test: it takes a second or two for each kill. Exits with 1 if a run does not end as its whole twin did.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cli
import selfalign
from llm import LLM, Answered
from mh import sample_posterior
from run import Run
from standin import StandIn
from test_run import REWARD, TASK, Dot


def small_run(folder, method):
    """A run of the dot of test_run.py, begun or gone on with."""
    if not (folder / "settings.json").exists():               # killed before there were settings: nothing to go on with
        for path in folder.glob("*"):
            path.unlink()
    settings = None if (folder / "settings.json").exists() else {"task": "reach", "reward": method, "obs": "state", "seed": 5, "steps": 1500}
    run = Run(folder, settings)
    selfalign.train(Dot, TASK, LLM(Answered(run.answered, StandIn()), run.exchange), run, method, 5, 1500, proposal=str(folder.parent / "r.py"),
                    beside=cli.second_core("cpu"))
    run.close()


def in_a_process_of_its_own(folder, method):
    """Its process number; it prints nothing."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            small_run(folder, method)
        except BaseException as error:                        # a child must not go on with the parent's work
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def result(folder):
    """What two equal runs have in common."""
    asked = [{**json.loads(line), "seconds": 0} for line in (folder / "llm.jsonl").read_text().splitlines()]
    with np.load(folder / "episodes.npz") as episodes:
        lived = [episodes[name].tolist() for name in episodes.files]
    return [(folder / name).read_bytes() for name in ("metrics.csv", "theta.csv")], asked, lived


def main(kills):
    torch.set_num_threads(1)
    for name, value in dict(UPDATE_EVERY=300, EVAL_EVERY=100, EVAL_EPISODES=2, EXPLORE_STEPS=100, RANKED=4, BATCH={"state": 16},
                            AGENT={"state": dict(hidden_dim=16, lr=1e-3, std=(1.0, 0.5, 500))},
                            sample_posterior=partial(sample_posterior, steps=(50,)), being_learnt=lambda successes: False).items():
        setattr(selfalign, name, value)
    real_rank, rng, wrong = selfalign.rank_attempts, random.Random(0), 0

    def rank_attempts(llm, task, T):                          # asks, and says what the reward does not, so that θ changes
        real_rank(llm, task, T)
        return [[int(i)] for i in np.argsort([tau[:, 1].sum() for tau in T])]
    selfalign.rank_attempts = rank_attempts
    for method in ("selfalign", "fixed", "sparse"):
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "r.py").write_text(REWARD)
            whole, started = Path(temporary) / "whole", time.monotonic()
            os.waitpid(in_a_process_of_its_own(whole, method), 0)
            takes, done, runs, in_write = time.monotonic() - started, 0, 0, 0
            while done < kills:
                folder, ended = Path(temporary) / f"run{runs}", None
                while ended is None:
                    pid = in_a_process_of_its_own(folder, method)
                    limit, waits_for_write = time.monotonic() + rng.uniform(0, takes), rng.random() < 0.3
                    while time.monotonic() < limit and not (waits_for_write and rng.random() < 0.2 and list(folder.glob("*.part"))):
                        pass
                    writing = bool(list(folder.glob("*.part")))
                    os.kill(pid, signal.SIGKILL)
                    status = os.waitpid(pid, 0)[1]
                    if os.WIFSIGNALED(status):
                        done, in_write = done + 1, in_write + writing
                    else:
                        ended = os.waitstatus_to_exitcode(status)
                runs += 1
                same = ended == 0 and result(folder) == result(whole)
                wrong += not same
            print(f"{method}: {done} kills in {runs} runs, {in_write} of them while a file was written; runs that ended otherwise "
                  f"than the whole one so far: {wrong}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]))
