"""Is a new θ better on trajectories that it has not seen? An update of θ judged in seconds, without training.

    python heldout.py runs/touch-selfalign-1                                  # the stand-in's proposal
    python heldout.py runs/touch-selfalign-1 my_reward.md reward.py --wrong   # others, and each number wrong tenfold

Takes the episodes of a run of 10,000 steps or more. The scripted stand-in ranks K of the first period, θ is updated as in the
loop, and R_θ then orders *other* episodes by pairs: `held` are the rest of that period's second half, `late` what came after it.
Printed is the share of pairs that R_θ orders as the stand-in's progress score does, before and after the update. A pair counts
where scores differ by more than the stand-in's tolerance; one that R_θ leaves equal counts half.
"""

import argparse
import json
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

import standin
from envs import TASKS
from llm import LLM, prompt, read_code
from questions import describe, rank_attempts
from reward import Reward, RewardError, RTheta
from selfalign import (DISCORDANT, GAIN, UPDATE_EVERY, Change, choose_trajectories, discordant, estimate, pairs_of,
                       sample_theta)
from mh import SamplerError

MOST = 150      # episodes of each kind that are compared


def scores_of(task, episodes):
    """The stand-in's progress score of each episode, read off its description as in a ranking."""
    return np.array(list(standin.scores_of(f"{task.goal}\n\n{describe(task, episodes)}").values()))


def accuracy(reward, theta, episodes, scores):
    """Share of the pairs of episodes with clearly different scores that R_θ orders as the scores do; NaN without any."""
    pairs = np.argwhere(scores[:, None] - scores[None, :] > standin.EQUAL)
    return 1 - discordant(reward.returns(episodes)(theta), pairs).mean() if len(pairs) else np.nan


def judge(task, reward, theta, episodes, scores, seed=0):
    """One update of θ after the first period: a dict of accuracies, whether it is taken, and the sampler's diagnostics."""
    period, rng = UPDATE_EVERY // task.horizon, np.random.default_rng(seed)
    r_theta = RTheta(reward, episodes[0])
    r_theta.theta = theta
    T, age, chosen = choose_trajectories(episodes[:period], r_theta, task.horizon, rng)
    pairs = pairs_of(rank_attempts(LLM(standin.StandIn(), lambda exchange: None), task, T))
    new, result = theta, {"taken": 0, "rhat": np.nan, "ess": np.nan}
    if discordant(reward.returns(T)(theta), pairs).sum() > DISCORDANT * len(pairs):      # what `selfalign.align` does
        posterior = sample_theta(reward, theta, [(T, pairs)], rng)
        better, gain = estimate(posterior, reward, Change(0, "proposal", theta, theta), [(T, pairs)])
        taken = posterior.mixed and gain > GAIN
        new = better if taken else theta
        result = {"taken": int(taken), "rhat": posterior.rhat.max(), "ess": posterior.ess.min()}
    groups = {"T": chosen, "held": np.setdiff1d(np.arange(period // 2, min(period, len(episodes))), chosen)[:MOST],
              "late": np.arange(period, len(episodes))}
    groups["late"] = groups["late"][np.linspace(0, len(groups["late"]) - 1, min(MOST, len(groups["late"]))).astype(int)]
    for kind, chosen in groups.items():
        some = [episodes[i] for i in chosen]
        for when, params in (("before", theta), ("after", new)):
            result[f"{kind}_{when}"] = accuracy(reward, params, some, scores[chosen]) if some else np.nan
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, with settings.json and episodes.npz")
    parser.add_argument("proposal", nargs="*", help="files with rewards (default: the stand-in's own proposal)")
    parser.add_argument("--wrong", action="store_true", help="also each parameter ten times too large and too small")
    args = parser.parse_args()
    try:
        task = TASKS[json.loads((Path(args.run) / "settings.json").read_text(encoding="utf-8"))["task"]]
        with np.load(Path(args.run) / "episodes.npz") as archive:
            episodes = [archive[f"arr_{i}"].astype(float) for i in range(len(archive.files))]
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"{args.run} holds no finished run: {error}")
    if len(episodes) < UPDATE_EVERY // task.horizon:
        sys.exit(f"{args.run} has {len(episodes)} episodes, and one update of θ takes {UPDATE_EVERY // task.horizon}: name a run of "
                 f"{UPDATE_EVERY:,} steps or more, such as one of touch")
    scores = scores_of(task, episodes)
    header = [f"{kind}_{when}" for kind in ("T", "held", "late") for when in ("before", "after")] + ["taken", "rhat", "ess"]
    print(",".join(["run", "proposal", "parameter", "factor", *header]))
    rows = []
    for path in args.proposal or ["(stand-in)"]:
        try:
            text = Path(path).read_text(encoding="utf-8") if args.proposal else prompt(f"offline/{task.name}")
            reward = Reward(read_code(text), task.features)
        except (OSError, ValueError) as error:
            sys.exit(f"{path} holds no reward for {task.name}: {error}")
        for name, factor in [("", 1.0)] + [(name, f) for name in reward.params for f in (10.0, 0.1) if args.wrong]:
            theta = {**reward.params, **({name: reward.params[name] * factor} if name else {})}
            try:
                result = judge(task, reward, theta, episodes, scores)
            except (SamplerError, RewardError) as error:
                print(f"{path}, {name} x {factor:g}: {error}", file=sys.stderr)
                continue
            rows.append([result[column] for column in header])
            print(",".join([args.run, Path(path).name, name, f"{factor:g}", *(f"{x:.4g}" for x in rows[-1])]), flush=True)
    if not rows:
        sys.exit("no update of θ could be judged")
    # Masked is what there is none of, such as the accuracy on later episodes of a run without any.
    known = np.ma.masked_invalid(rows)
    mean, worst = known.mean(axis=0).filled(np.nan), (known[:, [3, 5]] - known[:, [2, 4]]).min(axis=0).filled(np.nan)
    means = [f"{kind} {mean[i]:.3f} -> {mean[i + 1]:.3f}"
             for kind, i in (("T", 0), ("held", 2), ("late", 4)) if mean[i] >= 0]
    worsts = [f"{kind} {least:+.3f}" for kind, least in zip(("held", "late"), worst) if np.isfinite(least)]
    sampled = [row[7:9] for row in rows if row[7] > 0]
    diagnostics = (f"; R-hat up to {max(rhat for rhat, _ in sampled):.3f}, effective sample size from "
                   f"{min(ess for _, ess in sampled):.0f}") if sampled else ""
    print(f"mean of {len(rows)}: {', '.join(means)}; worst change {', '.join(worsts)}; taken {mean[6]:.0%}{diagnostics}",
          file=sys.stderr)


if __name__ == "__main__":
    main()
