"""Is a new θ better on episodes that it has not seen? One update judged in seconds, no training.

    python experiments/heldout.py runs/touch-selfalign-1                    # the stand-in's reward
    python experiments/heldout.py runs/touch-selfalign-1 reward.md --wrong

Takes the episodes of a run of more than one period. The stand-in ranks K of the first period, θ is
updated as in the loop, and R_θ then orders other episodes: "held" are the rest of that period's
second half, "late" are later ones. Each column is the share of pairs that R_θ orders like the
stand-in's progress score, before and after the update. Pairs of nearly equal scores do not count.
"""

import argparse
import csv
import json
import sys
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs import TASKS  # noqa: E402
from llm import LLM, PROMPTS, describe, read_code  # noqa: E402
from mh import discordance  # noqa: E402
from reward import Reward  # noqa: E402
from run import Change, State  # noqa: E402
from selfalign import Config, update_theta  # noqa: E402
from standin import EQUAL, StandIn, read_attempts, score  # noqa: E402

MOST = 150  # episodes of each kind that are compared
KINDS = ("ranked", "held", "late")
COLUMNS = [f"{kind}_{when}" for kind in KINDS for when in ("before", "after")]


def read_features(folder: Path) -> list[np.ndarray]:
    """(T, F) of each episode that a run has lived."""
    features = []
    for path in sorted((folder / "episodes").glob("[0-9]*.npz")):
        with np.load(path) as arrays:
            features.append(arrays["features"])
    return features


def agreement(reward: Reward, theta: dict, task, T: list) -> float:
    """Share of the pairs of T that R_θ orders like the stand-in's scores; NaN without a pair."""
    attempts = read_attempts(describe(task, T)).values()
    scores = np.array([score(attempt, task.steps) for attempt in attempts])
    pairs = np.argwhere(scores[:, None] > scores[None, :] + EQUAL) if len(T) else []
    return 1 - discordance(reward.returns(T)(theta), pairs) if len(pairs) else np.nan


def judge(task, reward: Reward, theta: dict, features: list, c: Config) -> dict:
    """Agreement before and after one update at the end of the first period, and its cause.

    Raises ValueError for fewer episodes than a period has.
    """
    ends = np.cumsum([len(tau) for tau in features])
    count = int(np.searchsorted(ends, c.update_every)) + 1
    if count > len(features):
        raise ValueError(f"{ends[-1]:,} steps are less than a period of {c.update_every:,}")
    first = Change(0, "proposal", reward.source, theta, theta)
    state = State(step=int(ends[count - 1]), changes=[first], features=features[:count])
    with redirect_stdout(sys.stderr):
        change = update_theta(LLM(StandIn()), task, state, c, np.random.default_rng(c.seed))
    ranked = state.D[-1][0]
    places = np.linspace(count, len(features) - 1, MOST).round().astype(int)
    held = np.setdiff1d(np.arange(count // 2, count), ranked)[:MOST]
    late = np.unique(places) if count < len(features) else []
    result = {"cause": change.cause if change else ""}
    for kind, numbers in zip(KINDS, (ranked, held, late)):
        T = [features[i] for i in numbers]
        result[f"{kind}_before"] = agreement(reward, theta, task, T)
        result[f"{kind}_after"] = agreement(reward, change.theta if change else theta, task, T)
    return result


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("proposal", nargs="*", type=Path, help="files with other first rewards")
    parser.add_argument("--wrong", action="store_true", help="also each number × 10 and ÷ 10")
    args = parser.parse_args()
    try:
        settings = json.loads((args.run / "settings.json").read_text())
        c, features = Config(**settings), read_features(args.run)
        task, results = TASKS[c.task], []
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(["proposal", "parameter", "factor", *COLUMNS, "cause"])
        for path in args.proposal or [PROMPTS / "offline" / f"{c.task}.txt"]:
            reward = Reward(read_code(path.read_text(encoding="utf-8")), task.features)
            wrong = product(reward.params, (10.0, 0.1)) if args.wrong else ()
            for name, factor in [("", 1.0), *wrong]:
                theta = reward.params | ({name: factor * reward.params[name]} if name else {})
                result = judge(task, reward, theta, features, c)
                results.append([result[column] for column in COLUMNS])
                cells = [f"{value:.3f}" for value in results[-1]]
                out.writerow([path.name, name, f"{factor:g}", *cells, result["cause"]])
                sys.stdout.flush()
    except (OSError, ValueError) as error:
        sys.exit(f"heldout.py: {error}")
    means = np.ma.masked_invalid(results).mean(axis=0).filled(np.nan)
    said = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(COLUMNS, means))
    print(f"mean of {len(results)}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
