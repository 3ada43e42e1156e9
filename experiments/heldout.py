"""Is a new θ better on episodes that it has not seen? One update judged in seconds, no training.

    python experiments/heldout.py runs/touch-selfalign-1 experiments/replies/propose-touch-*.md

Takes the episodes of a run of more than one period. The stand-in ranks K of the first period, θ is
updated as in the loop, and R_θ then orders other episodes: "held" are the rest of that period's
second half, "late" are later ones. Each column is the share of pairs that R_θ orders like the
stand-in's progress score, before and after the update. Pairs of nearly equal scores do not count.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import study  # noqa: F401, it finds the modules

from envs import TASKS
from llm import LLM, read_code
from mh import discordance
from reward import Reward
from run import Change, State
from selfalign import Config, update_theta
from standin import EQUAL, StandIn, score

MOST = 150  # episodes of each kind that are compared
KINDS = ("ranked", "held", "late")
COLUMNS = [f"{kind}_{when}" for kind in KINDS for when in ("before", "after")]


def read_features(folder: Path) -> list[np.ndarray]:
    """(T, F) of each episode that a run has lived."""
    paths = sorted((folder / "episodes").glob("[0-9]*.npz"))
    return [np.load(path)["features"] for path in paths]


def agreement(reward: Reward, theta: dict, task, T: list) -> float:
    """Share of the pairs of T that R_θ orders like the stand-in's scores; NaN without a pair."""
    scores = np.array([score(task, tau) for tau in T])
    pairs = np.argwhere(scores[:, None] > scores[None, :] + EQUAL) if len(T) else []
    return 1 - discordance(reward.returns(T)(theta), pairs) if len(pairs) else np.nan


def judge(task, reward: Reward, features: list, c: Config) -> dict:
    """Agreement before and after an update at the end of the first period, and its cause."""
    ends = np.cumsum([len(tau) for tau in features])
    count = int(np.searchsorted(ends, c.update_every)) + 1
    if count > len(features):
        raise ValueError(f"{ends[-1]:,} steps are less than a period of {c.update_every:,}")
    before = reward.params
    first = Change(0, "proposal", reward.source, before, before)
    state = State(step=int(ends[count - 1]), changes=[first], features=features[:count])
    with redirect_stdout(sys.stderr):
        change = update_theta(LLM(StandIn()), task, state, c, np.random.default_rng(c.seed))
    after = change.theta if change else before
    ranked, later = np.unique(state.D[-1][1]), np.arange(count, len(features))
    held = np.setdiff1d(np.arange(count // 2, count), ranked)[:MOST]
    result = {"cause": change.cause if change else ""}
    for kind, numbers in zip(KINDS, (ranked, held, later[:: len(later) // MOST + 1])):
        T = [features[i] for i in numbers]
        result[f"{kind}_before"] = agreement(reward, before, task, T)
        result[f"{kind}_after"] = agreement(reward, after, task, T)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("reward", nargs="+", type=Path, help="files with first rewards")
    args = parser.parse_args()
    try:
        c = Config(**json.loads((args.run / "settings.json").read_text()))
        task, features, results = TASKS[c.task], read_features(args.run), []
        print(",".join(["reward", *COLUMNS, "cause"]))
        for path in args.reward:
            reward = Reward(read_code(path.read_text(encoding="utf-8")), task.features)
            result = judge(task, reward, features, c)
            results.append([result[column] for column in COLUMNS])
            cells = [f"{value:.3f}" for value in results[-1]]
            print(",".join([path.name, *cells, result["cause"]]))
    except (OSError, ValueError) as error:
        sys.exit(f"heldout.py: {error}")
    means = np.ma.masked_invalid(results).mean(axis=0).filled(np.nan)
    said = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(COLUMNS, means))
    print(f"mean of {len(results)}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
