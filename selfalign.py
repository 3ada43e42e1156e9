"""Learning Reward for Physical Skills using Large Language Model (Zeng & Xu, 2023): Algorithm 1.

    python selfalign.py --task touch                    # no API key set: a scripted stand-in plays the LLM
    python selfalign.py --play runs/touch-selfalign-1   # watch the policy

An LLM writes a parameterised reward R_θ; DrQ-v2 trains on it; every 10,000 steps the LLM ranks some of the
robot's trajectories; where it disagrees with R_θ, Metropolis-Hastings re-samples θ from the preferences; where it
agrees and the skill still fails, the LLM says what blocks it. `train` is the algorithm, top to bottom.
"""

import argparse
import csv
import io
import json
import os
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from drqv2 import DrQV2, ReplayBuffer
from envs import DT, EPISODE_STEPS, TASKS, PandaEnv, describe_features
from llm import (Chat, LLM, LLMError, Manual, Replay, describe_attempt, prompt, read_analysis, read_code,
                 read_ranking)
from mh import SamplerError, preference_loss, sample_posterior
from reward import FUNCTIONS, Reward
from standin import StandIn

UPDATE_EVERY = 10_000      # environment steps between two updates of θ
EVAL_EVERY = 1_000         # environment steps between two evaluations
EVAL_EPISODES = 20
RANKED = 48                # K, trajectories in one ranking
ANALYSED = 12              # of them in a failure analysis
DISCORDANT = 0.1           # share of the LLM's pairs that R_θ may order wrongly: rankings are that noisy
GAIN = 0.03                # by which the share of D's own pairs that R_θ orders rightly must rise for a new θ to be taken
WORSE = 0.7                # a change is undone if the LLM prefers the attempts from before it this often, ties counted half
FAILS = 0.1                # a period of at most this mean success calls for an analysis beside the posterior
BETTER = 0.6               # no analysis while it prefers the newest attempts to earlier ones more often than this
EXPLORE_STEPS = 1_000      # uniform random actions first
DISCOUNT = 0.97

# Near DrQ-v2's own settings for pixels; for states, a smaller network that learns faster from few samples.
AGENT = {"pixels": dict(lr=1e-4, hidden_dim=1024, std=(1.0, 0.1, 50_000), saturation=0.01, average=0.005),
         "state": dict(lr=1e-3, hidden_dim=256, std=(1.0, 0.1, 10_000), saturation=0.01, average=0.005)}
BATCH = {"pixels": 256, "state": 128}


def train(args, llm, run):
    """Algorithm 1. Returns the number of environment steps to 100 % success, or None within args.steps."""
    task = TASKS[args.task]
    env, eval_env = PandaEnv(args.task, args.obs), PandaEnv(args.task, args.obs)
    torch.manual_seed(args.seed)
    # Streams of their own, so that a run whose θ never changes is the run of the fixed reward, byte for byte.
    rng, rank_rng = np.random.default_rng([args.seed, 0]), np.random.default_rng([args.seed, 1])
    agent = DrQV2(env.obs_shape, env.action_shape, device=args.device, **AGENT[args.obs])
    buffer = ReplayBuffer(args.steps + args.steps // EPISODE_STEPS + 2, env.obs_shape, env.action_shape,
                          n_features=len(task.features), obs_dtype=env.obs_dtype,
                          frame_stack=3 if args.obs == "pixels" else 1, discount=DISCOUNT, seed=args.seed)
    run.policy, run.buffer = agent, buffer
    eval_env.reset(seed=1_000_000 + args.seed)

    # R_θ ← the LLM proposes a reward; θ, its parameters; D, the preferences
    reward, theta, centre, scale = None, {}, 0.0, 1.0
    if args.reward != "sparse":
        tried = random_features(args.task)
        reward = propose_reward(llm, args.task, tried, args.proposal)
        theta = dict(reward.params)
        # Nothing terminates, so a constant added to r_θ changes nothing about which policy is best. Yet the critic
        # starts at 0: were all rewards above that, whatever is tried first would look better than what is not, and
        # the actor would saturate there for good. So random behaviour earns 0 on average to begin with.
        centre = reward.total(tried, theta).mean()
        print_reward(reward)
        run.record_theta(Change(0, "proposal", theta, theta))
        run.save_reward(reward, theta)

    def r_theta(features):
        """r_θ(f_t) of one step (F,) or of many (N, F), as the critic sees it; 0 where it is not finite."""
        total = reward.total(dict(zip(task.features, features.T)), theta)
        return np.nan_to_num((total - centre) / scale, nan=0.0, posinf=0.0, neginf=0.0)

    D, successes, explore_since = [], [], 0
    changes = [Change(0, "proposal", theta, theta)]
    started = time.monotonic()

    obs, _ = env.reset(seed=args.seed)
    buffer.begin(obs)
    for step in range(1, args.steps + 1):
        # train the DrQ-v2 policy on R_θ
        action = rng.uniform(-1, 1, 4) if step <= EXPLORE_STEPS else agent.act(obs, step - explore_since)
        obs, sparse_reward, terminated, truncated, info = env.step(action)
        f_t = np.array(list(info["features"].values()))
        r = sparse_reward if reward is None else r_theta(f_t)
        buffer.add(action, obs, r, terminated, truncated, f_t)
        if terminated or truncated:
            obs, _ = env.reset()
            buffer.begin(obs)
        if step > EXPLORE_STEPS and step % 2 == 0:
            losses = agent.update(buffer.sample(BATCH[args.obs]), step - explore_since)

        # stop when every one of the evaluation episodes succeeds, twice running
        if step % EVAL_EVERY == 0 and step > EXPLORE_STEPS:
            success, return_ = evaluate(agent, eval_env, reward, theta)
            successes.append(success)
            run.record_metrics(step, success, return_, losses)
            print_progress(step, args.steps, success, return_, started)
            if successes[-2:] == [1.0, 1.0]:
                return step - EVAL_EVERY

        # a period without any success: explore anew, from half of the schedule on (the same for every kind of reward)
        if step % UPDATE_EVERY == 0 and not any(successes[-(UPDATE_EVERY // EVAL_EVERY):]):
            explore_since = max(explore_since, step - agent.std[2] // 2)

        if step % UPDATE_EVERY == 0 and args.reward == "selfalign" and step < args.steps and not nearly_learnt(successes):
            # T ← K trajectories; ask the LLM to rank T; rank T by R_θ; D ← D ∪ pairs; a new θ, if there is a better one
            T, age, _ = choose_trajectories(buffer.episodes(), reward, theta, task.features, rank_rng)
            try:
                change = update_theta(llm, args.task, reward, T, age, D, changes, successes, step, rank_rng)
            except LLMError as error:
                print(f"\n  No new θ; training goes on with the one it has.\n  {error}\n", flush=True)
                continue
            if change:
                # relabel the whole replay buffer with the new R_θ, at the level that rewards had in the last half period
                features, _ = columns(buffer.episodes()[-(UPDATE_EVERY // EPISODE_STEPS // 2):], task.features)
                centre, scale = keep_level(reward.total(features, theta), reward.total(features, change.theta), centre, scale)
                theta = change.theta
                buffer.relabel(r_theta)
                changes.append(change)
                run.record_theta(change)
                run.save_reward(reward, theta)
    return None


def nearly_learnt(successes):
    """Whether θ is best left alone: the skill mostly succeeds, or often, and more so than ever in earlier periods.

    successes: success rate of every evaluation so far. What has come that far rises by itself or is a matter of the
    last few per cent, which no ranking of whole trajectories tells apart; a new reward could only disturb it.
    """
    before, now = successes[:-(UPDATE_EVERY // EVAL_EVERY)], np.mean(successes[-3:])
    return now >= 0.8 or (now >= 0.4 and now > max(before, default=0.0))


def choose_trajectories(episodes, reward, theta, names, rng):
    """T: K of `episodes`, shuffled; the age of each, counted in periods; and its index.

    episodes: (steps, F) arrays, oldest first. A quarter of T are the last period's newest, which show what the policy has
    come to do, and a quarter those that were the newest one period before, so that the LLM sees whether the last θ made
    the robot better or worse. The others are drawn evenly from the last period in order of R_θ. In the first period,
    these make up the quarter that is missing.
    """
    period = UPDATE_EVERY // EPISODE_STEPS
    end, quarter = len(episodes), RANKED // 4
    last = np.arange(max(0, end - period), end)
    # Odd places of the newest, even ones a period later: no pair of trajectories is ranked twice.
    newest = [np.linspace(stop - period // 4, stop - 1, 2 * quarter).round().astype(int)[odd::2]
              for stop, odd in ((end, 1), (end - period, 0)) if stop >= period // 2]
    rest = np.setdiff1d(last, np.concatenate(newest))
    by_return = rest[np.argsort(returns_of(reward, theta, *columns([episodes[i] for i in rest], names)))]
    spread = by_return[np.linspace(0, len(rest) - 1, RANKED - quarter * len(newest)).round().astype(int)]
    chosen = rng.permutation(np.concatenate([*newest, spread]))
    return [episodes[i] for i in chosen], (end - 1 - chosen) / period, chosen


def random_features(task):
    """Features (dict of (N,) arrays) of two episodes of random actions: real numbers to try a proposal on."""
    env, rng, rows = PandaEnv(task), np.random.default_rng(0), []
    for episode in range(2):
        env.reset(seed=episode)
        rows += [env.step(rng.uniform(-1, 1, 4))[4]["features"] for _ in range(EPISODE_STEPS)]
    env.close()
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def propose_reward(llm, task, features, path=None):
    """The LLM's reward for `task`; what does not parse, run or stay finite on `features` goes back to it.

    path: a file that holds a reward (Python, or Markdown with a code block), which is taken instead of asking.
    """
    def parse(text):
        reward = Reward(read_code(text), TASKS[task].features)
        reward.check(features)
        return reward

    if path:
        try:
            return parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LLMError(f"--proposal {path} cannot be used: {error}") from None
    question = prompt("propose", **task_words(task), functions=", ".join(f"np.{name}" for name in FUNCTIONS))
    return llm.ask("propose", question, parse)


def task_words(task):
    """What every prompt says of `task`: the values of its placeholders."""
    limited = len(TASKS[task].limits) > 0
    return dict(
        task=task, goal=TASKS[task].goal, features=describe_features(task), discount=DISCOUNT,
        limits=" and no limit is broken at any time of it, before or after" if limited else "",
        forbidden="What must it not do, and how is that punished without making it give up?" if limited else
                  "Nothing is forbidden here. Is there still something to discourage, without making it give up?",
        breaking="One that breaks a limit cannot succeed any more: put it below those that get as far without breaking "
                 "it, the lower the sooner and the further it is broken." if limited else "")


def columns(trajectories, names):
    """Trajectories, (T, F) arrays, end to end: ({name: (N,) array}, the index at which each begins)."""
    features = dict(zip(names, np.ascontiguousarray(np.concatenate(trajectories).T)))
    return features, np.cumsum([0] + [len(trajectory) for trajectory in trajectories[:-1]])


def returns_of(reward, theta, features, starts):
    """R_θ(τ) = Σ_t r_θ(f_t) of K trajectories as `columns` gives them.

    Shape (K,); with arrays of shape (C, 1) as θ's values, shape (C, K).
    """
    return np.add.reduceat(reward.total(features, theta), starts, axis=-1)


Change = namedtuple("Change", "step cause theta prior posterior", defaults=(None,))    # of θ; prior: the prior's centre


def update_theta(llm, task, reward, T, age, D, changes, successes, step, rng):
    """One update of θ: a `Change`, or None where θ is best left as it is.

    D grows by the LLM's ranking of T. Then, in this order:
    - where the last change of θ made the robot worse in the LLM's eyes, it is undone;
    - where the rankings disagree, θ is an estimate from p(θ | D), if the sampler has mixed and it explains D better;
    - else, or where hardly anything has succeeded for a whole period, the LLM is asked what blocks the robot, once that
      has stopped getting better.
    """
    names, now = TASKS[task].features, changes[-1]
    groups = rank_attempts(llm, task, T)
    pairs = pairs_of(groups)
    D.append((T, pairs))
    place = np.empty(len(T))
    for rank, group in enumerate(groups):
        place[group] = rank

    R = returns_of(reward, now.theta, *columns(T, names))
    wrong = discordant(R, pairs)
    print_rankings(groups, R, wrong, pairs)

    just_changed = now.step == step - UPDATE_EVERY and now.cause in ("posterior", "analysis")
    if just_changed and preferred(place, (1 <= age) & (age < 2), age < 0.25) > WORSE:
        print("  By the LLM's ranking the robot did better before the last change of θ: that change is undone.\n", flush=True)
        return changes[-2]._replace(step=step, cause="undone", posterior=None)

    change = None
    if wrong.sum() > DISCORDANT * len(pairs):
        try:
            posterior = align(reward, now.prior, D, names, rng)
        except SamplerError as error:
            print(f"  No posterior: {error}", flush=True)
        else:
            theta, gain = estimate(posterior, reward, now, D, names)
            print_posterior(posterior, now.theta, theta, gain)
            if posterior.mixed and gain > GAIN:
                change = now = Change(step, "posterior", theta, now.prior, posterior)

    stalled = preferred(place, age < 0.25, (0.25 <= age) & (age < 0.75)) <= BETTER
    if stalled and (change is None or np.mean(successes[-(UPDATE_EVERY // EVAL_EVERY):]) <= FAILS):
        told = changes if change is None else [*changes, change]
        try:
            blocked_by, params = analyse_failure(llm, task, reward, T, wrong, told, successes)
        except LLMError as error:                   # which must not cost what the sampler has found
            print(f"  No analysis: {error}\n", flush=True)
            return change
        print_analysis(blocked_by, now.theta, params)
        theta = {**now.theta, **params}
        if all(theta != earlier.theta for earlier in told):        # neither the same nor one that was undone
            change = Change(step, "analysis", theta, {**now.prior, **params}, now.posterior if change else None)
    return change


def estimate(posterior, reward, now, D, names):
    """(θ, by how much the share of D's pairs that it explains exceeds that of `now.theta`).

    θ is the posterior's mean. Where thresholds split the posterior into modes, their mean may lie in none of them and
    explain nothing; then it is the mean of that tenth of the draws which explains D best.
    """
    def gain(theta):
        return explained(reward, theta, D, names) - explained(reward, now.theta, D, names)

    theta = dict(zip(now.theta, posterior.mean.tolist()))
    if gain(theta) <= GAIN:
        draws = posterior.samples[:, ::max(1, posterior.samples.shape[1] // 50)].reshape(-1, len(theta))
        shares = np.array([explained(reward, dict(zip(theta, draw.tolist())), D, names) for draw in draws])
        best = draws[shares >= np.quantile(shares, 0.9)]
        positive = np.array(list(now.prior.values())) > 0             # these are sampled as log θ, see mh.py
        mean = np.where(positive, np.exp(np.log(np.where(positive, best, 1.0)).mean(axis=0)), best.mean(axis=0))
        centre = dict(zip(theta, mean.tolist()))
        theta = max(theta, centre, key=gain)
    return theta, float(gain(theta))


def pairs_of(groups):
    """The pairs (better, worse), (M, 2), of a ranking: groups of equally good indices, best first."""
    return np.array([(i, j) for rank, better in enumerate(groups) for worse in groups[rank + 1:]
                     for i in better for j in worse], dtype=int).reshape(-1, 2)


def discordant(returns, pairs):
    """(M,) 1 for each pair that R_θ orders the other way round, 1/2 where it sees no difference, else 0."""
    margin = returns[pairs[:, 0]] - returns[pairs[:, 1]]
    return np.where(margin > 0, 0.0, np.where(margin < 0, 1.0, 0.5))


def explained(reward, theta, D, names):
    """Share of the pairs of D that R_θ orders as the LLM does, each ranking counted alike."""
    shares = [1 - discordant(returns_of(reward, theta, *columns(T, names)), pairs).mean() for T, pairs in D if len(pairs)]
    return float(np.mean(shares))


def preferred(place, some, others):
    """How likely the LLM ranks one of `some` above one of `others`, ties counted half; 0.5 where there are none.

    place: (K,) places in the ranking, 0 the best. some, others: (K,) bool.
    """
    if not some.any() or not others.any():
        return 0.5
    difference = place[others][None, :] - place[some][:, None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def align(reward, prior, D, names, rng):
    """The posterior p(θ | D); prior: θ's centre by name. A ranking of K weighs its pairs 2/K, see mh.py."""
    features, starts = columns([tau for T, _ in D for tau in T], names)
    offsets = np.cumsum([0] + [len(T) for T, _ in D[:-1]])
    pairs = np.concatenate([pairs + offset for (_, pairs), offset in zip(D, offsets)])
    weights = np.concatenate([np.full(len(pairs), 2 / len(T)) for T, pairs in D])

    def log_likelihood(theta):
        params = {name: theta[:, i:i + 1] for i, name in enumerate(prior)}
        returns = returns_of(reward, params, features, starts)
        # An infinite return would seem to explain every preference for its trajectory.
        finite = np.isfinite(returns).all(axis=-1)
        return np.where(finite, -preference_loss(np.where(finite[:, None], returns, 0.0), pairs, weights), -np.inf)

    return sample_posterior(log_likelihood, list(prior.values()), rng=rng)


def describe(task, trajectories, notes=None):
    """Trajectories as text, numbered from 1 in the order given, each followed by its note."""
    names = TASKS[task].features
    texts = [describe_attempt(i + 1, dict(zip(names, trajectory.T)), DT, TASKS[task])
             for i, trajectory in enumerate(trajectories)]
    return "\n\n".join(f"{text}\n  {note}" if note else text for text, note in zip(texts, notes or [""] * len(texts)))


def rank_attempts(llm, task, trajectories):
    """The LLM's ranking of trajectories: groups of equally good indices, best first."""
    question = prompt("rank", **task_words(task), count=len(trajectories), trajectories=describe(task, trajectories))
    groups = llm.ask("rank", question, lambda text: read_ranking(text, len(trajectories)))
    return [[label - 1 for label in group] for group in groups]


def analyse_failure(llm, task, reward, trajectories, wrong, changes, successes):
    """(what blocks the skill, new values of some parameters, none if none is to blame), by the LLM."""
    theta = changes[-1].theta
    returns = returns_of(reward, theta, *columns(trajectories, TASKS[task].features))
    order = np.argsort(-returns)[np.unique(np.linspace(0, len(returns) - 1, ANALYSED).round().astype(int))]
    notes = []
    for i in order:
        terms = reward.terms(dict(zip(TASKS[task].features, trajectories[i].T)), theta)
        notes.append(f"reward per step {returns[i] / len(trajectories[i]):.3g} = " +
                     " + ".join(f"{term.mean():.3g} ({name})" for name, term in terms.items()))
    first = EXPLORE_STEPS // EVAL_EVERY + 1
    question = prompt("analyse", **task_words(task), wrong=f"{wrong.sum() / max(1, len(wrong)):.0%}", reward=reward.source_with(theta).strip(),
                      history="\n".join(f"- {change.step:,} steps, {change.cause}: "
                                        + ", ".join(f"{name}={value:.3g}" for name, value in change.theta.items())
                                        for change in changes),
                      progress=", ".join(f"{(first + i) * EVAL_EVERY:,}: {success:.0%}" for i, success in enumerate(successes)),
                      trajectories=describe(task, [trajectories[i] for i in order], notes))

    def parse(text):
        blocked_by, params = read_analysis(text, theta)
        new = returns_of(reward, {**theta, **params}, *columns(trajectories, TASKS[task].features))
        if not np.isfinite(new).all():
            raise ValueError("with these values the reward is not finite on the attempts: choose others")
        return blocked_by, params

    return llm.ask("analyse", question, parse)


def keep_level(old, new, centre, scale):
    """The centre and scale that give r_θ's new values the mean and spread that the old had, all arrays (N,).

    Rankings fix how r_θ's terms compare, but no constant and hardly their common scale; the critic is used to one.
    Values that are not finite do not count; a spread that changes a thousandfold or more (a reward as good as constant
    before or after) leaves the scale as it is.
    """
    old, new = np.ma.masked_invalid(old), np.ma.masked_invalid(new)
    spreads = new.std(), old.std()
    if not 1e-3 * spreads[1] < spreads[0] < 1e3 * spreads[1]:
        spreads = 1.0, 1.0
    shifted = new.mean() - (old.mean() - centre) * spreads[0] / spreads[1]
    return (float(shifted), scale * float(spreads[0] / spreads[1])) if np.isfinite(shifted) else (centre, scale)


def evaluate(agent, env, reward, theta):
    """(success rate, mean return) of the greedy policy over EVAL_EPISODES fresh episodes.

    The return is R_θ(τ), or the sum of the sparse reward where there is no R_θ.
    """
    successes, returns = 0, []
    for _ in range(EVAL_EPISODES):
        obs, _ = env.reset()
        sparse_return, rows, truncated = 0.0, [], False
        while not truncated:
            obs, sparse_reward, _, truncated, info = env.step(agent.act(obs, 0, explore=False))
            sparse_return += sparse_reward
            rows.append(list(info["features"].values()))
        successes += info["success"]
        returns.append(sparse_return if reward is None else
                       reward.total(dict(zip(env.feature_names, np.array(rows).T)), theta).sum())
    return successes / EVAL_EPISODES, float(np.mean(returns))


class Run:
    """The folder a run leaves behind: settings.json, metrics.csv, theta.csv, llm.jsonl, reward.py, policy.pt, episodes.npz.

    Files are written whole and moved into place, so that what stood there survives a failure. What cannot be
    written (a full disk) is kept and tried again with the next write; `close` falls back to the temporary folder.
    """

    def __init__(self, folder, settings):
        self.folder, self.policy, self.buffer = Path(folder), None, None
        self.files, self.failed = {}, {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                sys.exit(f"{folder} is not empty: choose another --out, or delete it")
        except OSError as error:
            sys.exit(f"cannot make the folder {folder}: {error.strerror}; choose another --out")
        self._table("metrics.csv", ["step", "success", "return", "critic_loss", "actor_loss", "q"])
        self._table("theta.csv", ["step", "cause", "name", "value", "low", "high", "rhat", "ess"])
        self._write("settings.json", json.dumps(settings, indent=2) + "\n")
        self._write("llm.jsonl", "")

    def record_metrics(self, step, success, return_, losses):
        """One evaluation; the policy is saved beside it."""
        self._row("metrics.csv", [step, success, f"{return_:.6g}"] + [f"{v:.6g}" for v in losses.values()])
        buffer = io.BytesIO()
        torch.save(self.policy.state_dict(), buffer)
        self._write("policy.pt", buffer.getvalue())

    def record_theta(self, change):
        """θ after a `Change`: proposal, posterior (with its 90 % interval and diagnostics), analysis or undone."""
        posterior = change.posterior
        blank = [[""] * len(change.theta)] * 4
        extra = blank if posterior is None else [*posterior.interval(0.9), posterior.rhat, posterior.ess]
        for name, value, *rest in zip(change.theta, change.theta.values(), *extra):
            self._row("theta.csv", [change.step, change.cause, name, f"{value:.6g}",
                                    *(f"{x:.6g}" if x != "" else "" for x in rest)])

    def record_exchange(self, exchange):
        """One question to the LLM and its answer, as a line of JSON."""
        self._append("llm.jsonl", json.dumps(exchange) + "\n")

    def save_reward(self, reward, theta):
        """The reward with θ as its defaults, as a Python file that works anywhere numpy is."""
        self._write("reward.py", f"import numpy as np\n\n\n{reward.source_with(theta).strip()}\n")

    def close(self):
        """Writes the episodes' features, and what could not be written before. Returns the folder that holds everything."""
        if self.buffer is not None:
            content = io.BytesIO()
            np.savez_compressed(content, *(episode.astype(np.float32) for episode in self.buffer.episodes()))
            self._write("episodes.npz", content.getvalue())
        if self.failed:
            for name in list(self.failed):
                self._write(name, self.files[name])
        if self.failed:
            rescue = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-"))
            for name, content in self.files.items():
                (rescue / name).write_bytes(content)
            print(f"What could not be written to {self.folder} is in {rescue}.", file=sys.stderr)
            return rescue
        return self.folder

    def _table(self, name, columns):
        self._write(name, ",".join(columns) + "\n")

    def _row(self, name, values):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self._append(name, line.getvalue())

    def _append(self, name, text):
        self._write(name, self.files[name] + text.encode())

    def _write(self, name, content):
        self.files[name] = content.encode() if isinstance(content, str) else content
        try:
            part = self.folder / (name + ".part")
            part.write_bytes(self.files[name])
            os.replace(part, self.folder / name)
            self.failed.pop(name, None)
        except OSError as error:
            if name not in self.failed:
                print(f"\n  Cannot write {self.folder / name}: {error.strerror}. Training goes on and the file is kept "
                      "in memory; free some space and it will be written.\n", file=sys.stderr, flush=True)
            self.failed[name] = error


def print_reward(reward):
    print("\nThe proposed reward R_θ; its defaults are the initial θ:\n")
    print("    " + reward.source.strip().replace("\n", "\n    ") + "\n", flush=True)


def print_progress(step, steps, success, return_, started):
    speed = step / (time.monotonic() - started)
    seconds = int((steps - step) / speed)
    left = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    bar = "█" * round(success * 20)
    print(f"{step:>8,} steps | success {success:>4.0%} {bar:·<20} | return {return_:>8.2f} | {speed:4.0f} steps/s | "
          f"at most {left} left", flush=True)


def print_rankings(groups, returns, wrong, pairs):
    by_reward = np.argsort(-returns, kind="stable")
    print(f"\n  Ranking {len(returns)} trajectories, best first")
    print("    LLM     " + " > ".join(" = ".join(str(i + 1) for i in group) for group in groups))
    print("    reward  " + " > ".join(str(i + 1) for i in by_reward))
    print(f"  The LLM orders {len(pairs):,} pairs, and R_θ orders {wrong.sum() / max(1, len(pairs)):.0%} of them otherwise.", flush=True)


def print_posterior(posterior, before, after, gain):
    chains, draws, _ = posterior.samples.shape
    print(f"\n  Metropolis-Hastings, {chains} chains of {draws:,} draws: acceptance {posterior.acceptance:.2f}, "
          f"R-hat up to {posterior.rhat.max():.3f}, effective sample size from {posterior.ess.min():.0f}")
    print(f"    {'θ':<20} {'before':>10} {'after':>10}   90 % interval")
    for name, low, high in zip(after, *posterior.interval(0.9)):
        print(f"    {name:<20} {before[name]:>10.4g} {after[name]:>10.4g}   {low:.3g} to {high:.3g}")
    taken = "" if posterior.mixed and gain > GAIN else (
        "; not taken: " + ("that is no better" if posterior.mixed else "the sampler has NOT mixed"))
    print(f"  Of the pairs ranked so far it orders {100 * gain:+.1f} % points more rightly{taken}.\n", flush=True)


def print_analysis(blocked_by, before, changes):
    print(f"\n  Asked what blocks the skill, the LLM says: {blocked_by}" + ("" if changes else "\n  It changes nothing."))
    for name, value in changes.items():
        print(f"    {name:<20} {before[name]:>10.4g} {value:>10.4g}")
    print(flush=True)


def play(folder, frames, episodes):
    """Shows a learnt policy in a window, or saves its frames as PNG files in the folder `frames`."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        state = torch.load(Path(folder) / "policy.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"{folder} holds no finished run to play ({error}); name a folder under runs/")
    if frames:
        try:
            from PIL import Image
        except ImportError:
            sys.exit('saving frames needs Pillow: pip install ".[frames]"')
        Path(frames).mkdir(parents=True, exist_ok=True)
    elif sys.platform == "linux" and not os.environ.get("DISPLAY"):
        sys.exit("there is no display to open a window on: add --frames FOLDER to save pictures instead")
    env = PandaEnv(settings["task"], settings["obs"], render_mode="rgb_array" if frames else "human")
    agent = DrQV2(env.obs_shape, env.action_shape, **AGENT[settings["obs"]])
    agent.load_state_dict(state)
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            if frames:
                Image.fromarray(env.render()).save(Path(frames) / f"episode{episode}-{env.t:02d}.png")
            obs, _, _, truncated, info = env.step(agent.act(obs, 0, explore=False))
        print(f"episode {episode}: {'success' if info['success'] else 'no success'}", flush=True)
    env.close()


def choose_backend(args):
    """The LLM behind --llm, and the line that names it on the screen."""
    kind = args.llm
    if kind == "auto":
        kind = "chat" if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL") else "offline"
    if kind == "chat":
        backend = Chat(args.model)
        return backend, f"{backend.model} at {backend.shown_url}"
    if kind == "offline":
        why = "" if args.llm == "offline" else " (OPENAI_API_KEY and OPENAI_BASE_URL are not set)"
        return StandIn(), f"offline stand-in{why}: scripted answers, NOT a language model"
    if kind == "manual":
        return Manual(), "you: paste the answers at the prompt"
    if kind.startswith("replay:"):
        return Replay(kind[len("replay:"):]), f"none: answers are replayed from {kind[len('replay:'):]}"
    raise LLMError(f"unknown --llm {kind}: choose auto, chat, offline, manual or replay:FILE")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="touch")
    parser.add_argument("--reward", choices=["selfalign", "fixed", "sparse"], default="selfalign",
                        help="selfalign: the whole algorithm; fixed: the LLM's first reward; sparse: 1 on success")
    parser.add_argument("--obs", choices=["state", "pixels"], default="state")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60_000, help="environment steps at most (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)")
    parser.add_argument("--llm", default="auto", metavar="auto|chat|offline|manual|replay:FILE",
                        help="auto: chat where OPENAI_API_KEY or OPENAI_BASE_URL is set, else offline")
    parser.add_argument("--model", default=os.environ.get("OPENAI_MODEL"), help="the LLM's name at the service")
    parser.add_argument("--proposal", metavar="FILE", help="start from the reward in FILE (Python, or Markdown with a code "
                        "block) instead of asking the LLM for one")
    parser.add_argument("--out", help="folder of the run (default: runs/TASK-REWARD-SEED)")
    parser.add_argument("--play", metavar="RUN", help="show the policy of a run's folder instead of training")
    parser.add_argument("--frames", metavar="FOLDER", help="with --play: save pictures instead of opening a window")
    parser.add_argument("--episodes", type=int, default=5, help="with --play: how many (default: %(default)s)")
    args = parser.parse_args()
    if args.proposal and args.reward == "sparse":
        parser.error("--proposal does nothing beside --reward sparse, which has no R_θ: leave one of them out")
    if args.seed < 0 or args.steps < 1 or args.episodes < 1:
        parser.error("--seed must be 0 or more, --steps and --episodes 1 or more")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    return args


def main():
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")      # θ and █ on a terminal that knows neither
    if args.play:
        return play(args.play, args.frames, args.episodes)
    if args.obs == "state":
        torch.set_num_threads(1)      # networks this small lose time to a second thread
    try:
        asks = args.reward == "selfalign" or args.reward == "fixed" and not args.proposal
        backend, who = choose_backend(args) if asks else (None, "none is asked")
    except LLMError as error:
        sys.exit(f"selfalign: {error}")
    folder = args.out or next(name for name in (f"runs/{args.task}-{args.reward}-{args.seed}{suffix}" for suffix in
                                                ["", *(f"-{i}" for i in range(2, 10_000))]) if not Path(name).exists())
    run = Run(folder, {name: value for name, value in vars(args).items() if name not in ("play", "frames", "episodes")})
    llm = LLM(backend, run.record_exchange)
    print(f"Task: {args.task}. {TASKS[args.task].goal}\nReward: {args.reward}, observations: {args.obs}, seed {args.seed}. "
          f"Everything is kept in {folder}.\nLLM: {who}", flush=True)
    steps = None
    try:
        steps = train(args, llm, run)
        print(f"\nDone: {args.task} reached {EVAL_EPISODES} of {EVAL_EPISODES} at {steps:,} environment steps, and again "
              f"{EVAL_EVERY:,} steps later." if steps else f"\nNot learnt within {args.steps:,} environment steps.")
    except LLMError as error:
        sys.exit(f"\nselfalign: {error}\nEvery exchange is in {run.close()}/llm.jsonl.")
    except KeyboardInterrupt:
        print("\nStopped.")
    folder = run.close()
    if llm.exchanges:
        print(f"LLM: {llm.exchanges} exchanges, {llm.prompt_tokens:,} + {llm.completion_tokens:,} tokens, {llm.seconds:.0f} s.")
    if (folder / "policy.pt").exists():
        print(f"Watch it:  python selfalign.py --play {folder}")


if __name__ == "__main__":
    main()
