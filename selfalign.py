"""Learning Reward for Physical Skills using Large Language Model (Zeng & Xu, 2023): Algorithm 1.

    python selfalign.py --task touch                    # no API key set: a scripted stand-in plays the LLM
    python selfalign.py --play runs/touch-selfalign-1   # watch the policy
    python selfalign.py --resume runs/touch-selfalign-1 # go on with a run that was stopped

An LLM writes a parameterised reward R_θ; DrQ-v2 trains on it; every 10,000 steps, unless the skill is being learnt, the LLM
ranks some of the robot's trajectories; where it disagrees with R_θ, Metropolis-Hastings re-samples θ from the preferences;
where it agrees, or hardly anything succeeds, and the robot gets no better, the LLM says what blocks it. `train` is the
algorithm, top to bottom.
"""

import contextlib
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
import torch

from cli import ending, parse_args, play, second_core, start
from drqv2 import DrQV2, ReplayBuffer
from envs import TASKS, PandaEnv
from llm import LLM, LLMError
from mh import Posterior, SamplerError, preference_loss, sample_posterior
from questions import analyse_failure, propose_reward, rank_attempts, rewrite_reward
from reward import Reward, RTheta
from run import Run, Screen, State, np_random, print_analysis, print_posterior, print_ranking, print_reward

UPDATE_EVERY = 10_000      # environment steps between two updates of θ: a period
RESET_EVERY = 10_000       # environment steps after which networks start anew if nothing has succeeded in them
EVAL_EVERY = 1_000         # environment steps between two evaluations
EVAL_EPISODES = 20
RANKED = 48                # K, trajectories in one ranking
DISCORDANT = 0.1           # share of the LLM's pairs that R_θ may order wrongly: rankings are that noisy
GAIN = 0.03                # by which the share of D's own pairs that R_θ orders rightly must rise for a new θ to be taken
WORSE = 0.7                # a change is undone if the LLM prefers the attempts from before it this often, ties counted half
FAILS = 0.1                # a period of at most this mean success calls for an analysis beside the posterior
BETTER = 0.6               # no analysis while the LLM prefers the newest attempts to earlier ones more often than this
EXPLORE_STEPS = 1_000      # uniform random actions first

# Smaller networks and batches than DrQ-v2's own, and larger learning rates, for two cores.
AGENT = {"pixels": dict(lr=6e-4, hidden_dim=256, std=(1.0, 0.1, 10_000), saturation=0.01, average=0.005, strides=(2, 2, 1, 1)),
         "state": dict(lr=1e-3, hidden_dim=256, std=(1.0, 0.1, 10_000), saturation=0.01, average=0.005)}
BATCH = {"pixels": 64, "state": 128}

# A new θ and where it comes from: step, cause (proposal, posterior, analysis, rewrite or undone), θ by name, the prior's centre
# for the next update, the mh.Posterior where there is one, and the reward's code (None: as it is).
Change = namedtuple("Change", "step cause theta prior posterior source", defaults=(None, None))


@dataclass
class History:
    """What an update of θ goes by."""

    changes: list = field(default_factory=list)          # every Change of θ, the proposal first
    D: list = field(default_factory=list)                # rankings: (T, pairs (M, 2) of indices into T, the better one first)
    evaluations: list = field(default_factory=list)      # (step, success rate)

    @property
    def successes(self) -> list[float]:
        return [success for _, success in self.evaluations]

    def state_dict(self) -> dict:
        """All of it as plain values and tensors, for a checkpoint, but for the posteriors, which nothing asks for again."""
        return {"changes": [list(change._replace(posterior=None)) for change in self.changes],
                "D": [[[torch.as_tensor(tau) for tau in T], torch.as_tensor(pairs)] for T, pairs in self.D],
                "evaluations": [list(evaluation) for evaluation in self.evaluations]}

    def load_state_dict(self, state: dict) -> None:
        self.changes = [Change(*change) for change in state["changes"]]
        self.D = [([tau.numpy() for tau in T], pairs.numpy()) for T, pairs in state["D"]]
        self.evaluations = [tuple(evaluation) for evaluation in state["evaluations"]]


def train(make_env, task, llm: LLM, run: Run, method: str = "selfalign", seed: int = 1, steps: int = 60_000,
          device: str = "cpu", proposal: str | None = None, precision: str = "float32", beside: bool = False) -> int | None:
    """Algorithm 1. Returns the number of environment steps to 100 % success, or None within `steps`.

        R_θ ← the LLM proposes a reward                                               propose_reward
        repeat
            train the DrQ-v2 policy on R_θ                                            DrQV2.update
            stop when every evaluation episode succeeds, twice running                Evaluations, evaluate
            every 10,000 environment steps, unless the skill is being learnt:         being_learnt
                T ← K trajectories of the replay buffer                               choose_trajectories
                rank T by the LLM; D ← D ∪ its pairs                                  rank_attempts, pairs_of
                if R_θ ranks T otherwise:         θ ← p(θ | D)                        new_theta, align
                else, or if the skill still fails: θ ← the LLM says what blocks it    new_theta, unblock
                relabel the whole replay buffer with the new R_θ                      RTheta.change, ReplayBuffer.relabel

    make_env: makes an environment with Gymnasium's signatures, actions in [-1, 1] and, in `info`, `features` (a dict of
    floats, in the order of task.features) and `success` (bool: fulfilled by now; what counts is the last step's). Observations
    are vectors, or (9, H, W) bytes: the last three RGB frames, the newest at the end.
    task: an envs.Task, or anything with its fields. method: "selfalign"; "rewrite" lets the LLM write R_θ anew (see `new_theta`);
    "fixed" keeps the first R_θ; "sparse" trains on the environment's own reward. proposal: a file with the first reward, instead of
    asking for one. precision: of convolutions, "float32" or "bfloat16". beside: evaluate in a process of its own, for a second core;
    it is forked, so on Linux and device "cpu" only.

    Raises LLMError without a usable first reward: an answer that cannot be used goes back to the LLM with the reason, up to
    llm.ATTEMPTS times. A ranking that fails in the same way is skipped, an analysis too. Raises ValueError for features that are
    not the task's, and for episodes so long that hardly any fits between two updates of θ, FloatingPointError when a loss is no
    longer a number, and ReplayError where a replayed run asks what its transcript does not answer.
    """
    if 4 * task.horizon > UPDATE_EVERY or task.horizon > EXPLORE_STEPS:
        raise ValueError(f"episodes of {task.horizon} steps are too long: at least 4 must fit into {UPDATE_EVERY} steps, and one "
                         f"into the first {EXPLORE_STEPS}")
    env, eval_env = make_env(), make_env()
    obs_space, action_shape = env.observation_space, env.action_space.shape
    kind = "pixels" if len(obs_space.shape) == 3 else "state"
    torch.manual_seed(seed)
    # Streams of their own, so that a run whose θ never changes is the run of the fixed reward, byte for byte.
    rng, rank_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    agent = DrQV2(obs_space.shape, action_shape, device=device, precision=getattr(torch, precision), **AGENT[kind])
    buffer = ReplayBuffer(2 * steps + 2, obs_space.shape, action_shape, n_features=len(task.features),
                          obs_dtype=obs_space.dtype, frame_stack=3 if kind == "pixels" else 1, discount=task.discount, seed=seed)
    history, r_theta = History(), None

    # R_θ ← the LLM proposes a reward
    if method != "sparse":
        tried = random_features(eval_env, task)
        first = run.reward(task) or propose_reward(llm, task, tried, proposal)
        r_theta = RTheta(first, tried)
        history.changes.append(Change(0, "proposal", r_theta.theta, r_theta.theta, source=first.source))
        run.proposed(r_theta.reward, history.changes[-1])

    eval_env.reset(seed=1_000_000 + seed)
    obs, _ = env.reset(seed=seed)
    # All that the rest of the run depends on; where the run was cut short, it goes on from the last checkpoint.
    state = run.state = State(agent, buffer, r_theta, history, env, eval_env, rng, rank_rng)
    if run.restore():
        if state.learnt or state.step >= steps:            # there is nothing left to do
            return history.evaluations[-2][0] if state.learnt else None
        obs, _ = env.reset()
    evaluations = Evaluations(agent, eval_env, r_theta, beside)
    buffer.begin(obs)
    step, update_at = state.step, UPDATE_EVERY * max(1, math.ceil(state.step / UPDATE_EVERY))
    while True:
        limit = min(update_at, steps)
        for step in range(step + 1, limit + 1):
            # train the DrQ-v2 policy on R_θ
            action = (rng.uniform(-1, 1, action_shape) if step <= EXPLORE_STEPS else
                      agent.act(obs, step - state.explore_since))
            obs, sparse_reward, terminated, truncated, info = env.step(action)
            f_t = np.array(list(info["features"].values()))
            buffer.add(action, obs, r_theta(f_t) if r_theta else sparse_reward, terminated, truncated, f_t)
            if terminated or truncated:
                state.episode_begins()
                obs, _ = env.reset()
                buffer.begin(obs)
            if step > EXPLORE_STEPS and step % 2 == 0:
                losses = agent.update(buffer.sample(BATCH[kind]), step - state.explore_since)

            # stop when every evaluation episode succeeds, twice running
            if step % EVAL_EVERY == 0 and step > EXPLORE_STEPS:
                evaluations.begin(step, losses)
            if evaluations.due(step, at_once=step == limit or run.stopping):
                evaluation = evaluations.end()
                history.evaluations.append(evaluation[:2])
                run.evaluated(*evaluation)
            state.step, state.learnt = step, history.successes[-2:] == [1.0, 1.0]
            if state.learnt or (terminated or truncated) and not evaluations.begun:
                run.checkpoint(last=state.learnt or step == steps)
            if state.learnt:
                return history.evaluations[-2][0]
        if step == steps:
            return None

        # every 10,000 environment steps
        update_at += UPDATE_EVERY
        if step % RESET_EVERY == 0 and not any(history.successes[-(RESET_EVERY // EVAL_EVERY):]):
            print(f"\n  No success in {RESET_EVERY:,} steps: the networks start anew.", flush=True)
            agent.reset()                                  # learn and explore anew, whatever the method
            state.explore_since = max(state.explore_since, step - agent.std[2] // 2)
        if method not in ("selfalign", "rewrite"):
            continue
        if being_learnt(history.successes):
            print("\n  The skill is being learnt: θ stays as it is, and no trajectories are ranked.\n", flush=True)
            continue
        # T ← K trajectories; rank T by the LLM; D ← D ∪ its pairs
        episodes = buffer.episodes()
        T, age, _ = choose_trajectories(episodes, r_theta, task.horizon, rank_rng)
        ranking = rank_attempts(llm, task, T)              # empty where the LLM fails
        if not ranking:
            continue
        history.D.append((T, pairs_of(ranking)))
        # θ ← p(θ | D), or what the LLM says blocks the skill; relabel the whole replay buffer
        change = new_theta(llm, task, r_theta.reward, history, ranking, age, step, rank_rng, method == "rewrite")
        if change:
            history.changes.append(change)
            r_theta.change(change.theta, episodes[-(UPDATE_EVERY // task.horizon // 2):], change.source)     # the last half period's
            buffer.relabel(r_theta)
            run.theta(r_theta.reward, change)


def random_features(env, task) -> np.ndarray:
    """Features (N, F) of two episodes of random actions: real numbers to try a proposal on.

    Raises ValueError where they are not those of the task, in its order: everything else goes by their places.
    """
    rng, rows = np.random.default_rng(0), []
    for episode in range(2):
        env.reset(seed=episode)
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
            if list(info["features"]) != list(task.features):
                raise ValueError(f"the environment's features are {', '.join(info['features'])}, those of the task {task.name} "
                                 f"{', '.join(task.features)}: both need the same names in the same order")
            rows.append(list(info["features"].values()))
            over = terminated or truncated
    return np.array(rows)


class Evaluations:
    """`evaluate` on the policy as it is at `begin`: at `end`, or, beside the training, in a process of its own.

    That process is a copy of this one, environment included. Each time it gets the policy, R_θ and the generator of the episodes'
    starts, so what comes of it is the same to the bit. Training is a quarter of EVAL_EVERY steps ahead when it takes the result;
    once the skill is learnt, these are in vain.
    """

    def __init__(self, agent: DrQV2, env, r_theta: RTheta | None, beside: bool):
        self.agent, self.env, self.r_theta = agent, env, r_theta
        self.begun, self.ahead, self.pipe = None, 0, None
        if beside:
            fork = multiprocessing.get_context("fork")
            self.ahead, (self.pipe, its) = EVAL_EVERY // 4, fork.Pipe()
            fork.Process(target=self._serve, args=(its,), daemon=True).start()
            its.close()

    def begin(self, step: int, losses: dict) -> None:
        """Takes the policy at `step`; losses are kept beside it."""
        policy = io.BytesIO()
        torch.save(self.agent.greedy.state_dict(), policy)
        self.begun = step, losses, policy.getvalue()
        if self.pipe:
            generator = np_random(self.env)
            with contextlib.suppress(OSError):             # `end` says that nobody is there
                self.pipe.send((self.begun[-1], self.r_theta and self.r_theta.state_dict(), generator and generator.bit_generator.state))

    def due(self, step: int, at_once: bool) -> bool:
        """Whether to call `end` at `step`."""
        return self.begun is not None and (at_once or step >= self.begun[0] + self.ahead)

    def end(self) -> tuple:
        """(step, *what `evaluate` returns, losses, policy as torch.save writes it). Raises what `evaluate` raises, and
        ChildProcessError where its process is gone."""
        if self.pipe:
            try:
                result, generator, error, where = self.pipe.recv()
            except (EOFError, OSError):
                raise ChildProcessError("the process that evaluates the policy was killed") from None
            if error:
                raise error from RuntimeError(f"in the process that evaluates the policy:\n{where}")
            if generator:
                np_random(self.env).bit_generator.state = generator
        else:
            result = evaluate(self.agent, self.env, self.r_theta, EVAL_EPISODES)
        (step, losses, policy), self.begun = self.begun, None
        return step, *result, losses, policy

    def _serve(self, pipe):
        os.setpgrp()                                       # Ctrl-C is for the training, whose end of the pipe ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(3, pipe.fileno())                    # that end, and what keeps others out of the run's folder
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        torch.set_num_threads(1)
        with contextlib.suppress(EOFError, OSError):
            while True:
                policy, r_theta, starts = pipe.recv()
                try:
                    self.agent.greedy.load_state_dict(torch.load(io.BytesIO(policy), weights_only=True))
                    if r_theta:
                        self.r_theta.load_state_dict(r_theta)
                    generator = np_random(self.env)
                    if generator:
                        generator.bit_generator.state = starts
                    result = evaluate(self.agent, self.env, self.r_theta, EVAL_EPISODES)
                    pipe.send((result, generator and generator.bit_generator.state, None, None))
                except Exception as error:
                    where = traceback.format_exc()
                    try:
                        pickle.loads(pickle.dumps(error))
                    except Exception:                      # as it is, it would not get over
                        error = RuntimeError(f"{type(error).__name__}: {error}")
                    pipe.send((None, None, error, where))


def evaluate(agent: DrQV2, env, r_theta: RTheta | None, episodes: int) -> tuple[float, float, float]:
    """The greedy policy over so many fresh episodes: success rate, mean sum of the sparse reward, mean R_θ(τ).

    Without an R_θ, the sparse one takes its place.
    """
    successes, sparse_returns, returns = [], [], []
    for _ in range(episodes):
        obs, _ = env.reset()
        sparse, rows, over = [], [], False
        while not over:
            obs, sparse_reward, terminated, truncated, info = env.step(agent.act(obs, 0, explore=False))
            sparse.append(sparse_reward)
            rows.append(list(info["features"].values()))
            over = terminated or truncated
        successes.append(info["success"])
        sparse_returns.append(sum(sparse))
        returns.append(r_theta.reward.total(r_theta.reward.named(np.array(rows)), r_theta.theta).sum() if r_theta else sum(sparse))
    return float(np.mean(successes)), float(np.mean(sparse_returns)), float(np.mean(returns))


def being_learnt(successes: list[float]) -> bool:
    """Whether θ is best left alone: the skill succeeds two times in three, or one in four and more often than ever before.

    successes: success rate of every evaluation so far; the last three count as now. What has risen that far in its first
    period goes on rising nearly always, what stays high mostly does (README, "Wrong numbers"), and a new reward would disturb it.
    """
    now, before = round(np.mean(successes[-3:]), 6), successes[:-3]        # rounded, so that equal rates are equal
    return now > 0.66 or now > max([0.25, *before])


def choose_trajectories(episodes, r_theta, horizon, rng):
    """T: K of `episodes`, shuffled; the age of each, counted in periods; and its index.

    episodes: (steps, F) arrays, oldest first, of about `horizon` steps. A quarter of T come from the newest quarter of the last
    period, and show what the policy has come to do; a quarter come from the newest quarter of the period before, so that the
    LLM sees whether the last θ made the robot better or worse. The others are drawn evenly from the rest of the last period
    in order of R_θ. In the first period, these make up the quarter that is missing. Where a period has fewer episodes than
    that, T is smaller.
    """
    period = UPDATE_EVERY // horizon
    end, quarter = len(episodes), RANKED // 4

    def evenly(places, count):
        return places[np.unique(np.linspace(0, len(places) - 1, count).round().astype(int))]

    # Of K/2 places in the newest quarter, the odd ones are ranked now and the even ones one period later, so that few pairs
    # of trajectories are ranked twice.
    newest = [evenly(np.arange(stop - period // 4, stop), 2 * quarter)[odd::2]
              for stop, odd in ((end, 1), (end - period, 0)) if stop >= period // 2]
    rest = np.setdiff1d(np.arange(max(0, end - period), end), np.concatenate(newest))
    by_return = rest[np.argsort(r_theta.reward.returns([episodes[i] for i in rest])(r_theta.theta))]
    spread = evenly(by_return, RANKED - quarter * len(newest))
    chosen = rng.permutation(np.concatenate([*newest, spread]))
    return [episodes[i] for i in chosen], (end - 1 - chosen) / period, chosen


def pairs_of(ranking: list[list[int]]) -> np.ndarray:
    """The pairs (better, worse), (M, 2), of a ranking: groups of equally good indices, best first."""
    return np.array([(i, j) for rank, better in enumerate(ranking) for worse in ranking[rank + 1:]
                     for i in better for j in worse], dtype=int).reshape(-1, 2)


def discordant(returns: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(M,) 1 for each pair that R_θ orders the other way round, 1/2 where it sees no difference, else 0."""
    margin = returns[pairs[:, 0]] - returns[pairs[:, 1]]
    return np.where(margin > 0, 0.0, np.where(margin < 0, 1.0, 0.5))


def new_theta(llm, task, reward, history, ranking, age, step, rng, rewrite=False) -> Change | None:
    """One update of θ, after the ranking of the trajectories that D ends with; None where θ is best left as it is.

    - Where the change of θ one period ago made the robot worse in the LLM's eyes, it is undone: θ and the prior before it
      come back; policy and D stay.
    - Where the rankings disagree, θ is an estimate from p(θ | D), if the sampler has mixed and it explains D better.
    - Else, or where hardly anything has succeeded for a whole period, the LLM is asked what blocks the robot; in both cases
      only if its ranking shows that the robot does not get better anyway, or if nothing at all has succeeded in that period.

    rewrite: the LLM writes the reward anew instead, where the rankings disagree, or where it would be asked what blocks the robot.
    """
    (T, pairs), now = history.D[-1], history.changes[-1]
    R = reward.returns(T)(now.theta)
    wrong = discordant(R, pairs)
    print_ranking(ranking, R, wrong, pairs)

    place = np.empty(len(T))
    for rank, group in enumerate(ranking):
        place[group] = rank
    # What the policy did lately (age below 0.25 periods) against what it did before the last change, and earlier in this period.
    just_changed = now.step == step - UPDATE_EVERY and now.cause in ("posterior", "analysis", "rewrite")
    if just_changed and preferred(place, (1 <= age) & (age < 2), age < 0.25) > WORSE:
        print("  By the LLM's ranking the robot did better before the last change of θ: that change is undone.\n", flush=True)
        return history.changes[-2]._replace(step=step, cause="undone", posterior=None)

    change = None
    disagree = wrong.sum() > DISCORDANT * len(pairs)
    stalled = preferred(place, age < 0.25, (0.25 <= age) & (age < 0.75)) <= BETTER
    success = np.mean(history.successes[-(UPDATE_EVERY // EVAL_EVERY):])
    if rewrite:
        return write_anew(llm, task, reward, history, ranking, wrong, step) if disagree or stalled or success == 0 else None
    if disagree:
        change = align(reward, history, step, rng)
    if success == 0 or (stalled and (change is None or success <= FAILS)):
        change = unblock(llm, task, reward, history, stalled, change, step)
    print(flush=True)
    return change


def preferred(place, some, others):
    """How likely the LLM ranks one of `some` above one of `others`, ties counted half; 0.5 where there are none.

    place: (K,) places in the ranking, 0 the best. some, others: (K,) bool.
    """
    if not some.any() or not others.any():
        return 0.5
    difference = place[others][None, :] - place[some][:, None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def align(reward, history, step, rng) -> Change | None:
    """θ ← p(θ | D) by Metropolis-Hastings: `sample_theta` draws from it, `estimate` makes one θ of the draws.

    None where the sampler has not mixed, or where its θ does not explain D better.
    """
    now = history.changes[-1]
    try:
        posterior = sample_theta(reward, now.prior, history.D, rng)
    except SamplerError as error:
        print(f"\n  No posterior: {error}", flush=True)
        return None
    theta, gain = estimate(posterior, reward, now, history.D)
    refused = "the sampler has NOT mixed" if not posterior.mixed else "that is no better" if gain <= GAIN else None
    print_posterior(posterior, now.theta, theta, gain, refused)
    return None if refused else Change(step, "posterior", theta, now.prior, posterior)


def sample_theta(reward, prior, D, rng) -> Posterior:
    """The posterior p(θ | D); prior: θ's centre by name. A ranking of K weighs its pairs 2/K, see mh.py."""
    R = reward.returns([tau for T, _ in D for tau in T])
    known = np.isfinite(R(prior))                          # the others, rewarded without bound, tell nothing
    offsets = np.cumsum([0] + [len(T) for T, _ in D[:-1]])
    pairs = np.concatenate([pairs + offset for (_, pairs), offset in zip(D, offsets)])
    weights = np.concatenate([np.full(len(pairs), 2 / len(T)) for T, pairs in D])
    pairs, weights = pairs[known[pairs].all(axis=1)], weights[known[pairs].all(axis=1)]

    def log_likelihood(theta):
        returns = np.where(known, R({name: theta[:, i:i + 1] for i, name in enumerate(prior)}), 0.0)
        # An infinite return would seem to explain every preference for its trajectory.
        finite = np.isfinite(returns).all(axis=-1)
        return np.where(finite, -preference_loss(np.where(finite[:, None], returns, 0.0), pairs, weights), -np.inf)

    return sample_posterior(log_likelihood, list(prior.values()), rng=rng)


def estimate(posterior, reward, now, D):
    """(θ, by how much the share of D's pairs that it explains exceeds that of `now.theta`).

    θ is the posterior's mean, if that explains more by GAIN. Where thresholds split the posterior into modes, the mean may
    lie in none of them; then θ is the mean of that tenth of the draws which explains D best, if that explains more.
    """
    rankings = [(reward.returns(T), pairs) for T, pairs in D if len(pairs)]

    def explained(values):
        """Share of D's pairs that R_θ orders as the LLM does, each ranking counted alike."""
        theta = dict(zip(now.theta, values))
        return float(np.mean([1 - discordant(R(theta), pairs).mean() for R, pairs in rankings]))

    before = explained(now.theta.values())
    values = posterior.mean
    if explained(values) - before <= GAIN:
        draws = posterior.samples[:, ::max(1, posterior.samples.shape[1] // 50)].reshape(-1, len(values))
        shares = np.array([explained(draw) for draw in draws])
        best = draws[shares >= np.quantile(shares, 0.9)]
        values = max(values, np.exp(np.log(best).mean(axis=0)), key=explained)      # in log θ as well: all are positive
    return dict(zip(now.theta, values.tolist())), explained(values) - before


def unblock(llm, task, reward, history, stalled, change, step) -> Change | None:
    """θ as the LLM's failure analysis changes it.

    `change` is what the sampler has found in this update, or None; the analysis goes on from there. Where the LLM fails,
    names nothing or leads back to a θ that the run has had, `change` is returned as it is.
    """
    (T, pairs), changes = history.D[-1], [*history.changes, *([change] if change else [])]
    now = changes[-1]
    wrong = discordant(reward.returns(T)(now.theta), pairs).sum() / max(1, len(pairs))
    try:
        blocked_by, params = analyse_failure(llm, task, reward, T, wrong, stalled, changes, history.evaluations)
    except LLMError as error:
        print(f"\n  No analysis: {error}", flush=True)
        return change
    print_analysis(blocked_by, now.theta, params)
    theta = {**now.theta, **params}
    if any(theta == earlier.theta for earlier in changes):         # the same, or one that was undone
        if params:
            print("  The run has had that θ: it changes nothing.", flush=True)
        return change
    return Change(step, "analysis", theta, {**now.prior, **params})


def write_anew(llm, task, reward, history, ranking, wrong, step) -> Change | None:
    """R_θ as the LLM writes it anew; None where it fails or comes back to a reward that the run has had."""
    (T, pairs), changes = history.D[-1], history.changes
    try:
        better = rewrite_reward(llm, task, reward, T, ranking, wrong.sum() / max(1, len(pairs)), changes, history.evaluations)
    except LLMError as error:
        print(f"\n  No new reward: {error}", flush=True)
        return None
    print_reward("The LLM writes the reward anew", better)
    had = {Reward(earlier.source, reward.offered).source_with(earlier.theta) for earlier in changes if earlier.source}
    if better.source_with(better.params) in had:
        print("  The run has had that one: it changes nothing.\n", flush=True)
        return None
    return Change(step, "rewrite", better.params, better.params, source=better.source)


def main():
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    args = parse_args(__doc__)
    if args.play:
        return play(args.play, AGENT, args.episodes, args.frames, args.gif)
    run, llm = start(args)
    with ending(run, llm):
        steps = train(lambda: PandaEnv(args.task, args.obs), TASKS[args.task], llm, run, args.reward, args.seed, args.steps, args.device,
                      args.proposal, args.precision, beside=args.obs == "state" and second_core(args.device))
        print(f"\nDone: {args.task} reached {EVAL_EPISODES} of {EVAL_EPISODES} at {steps:,} environment steps, and again "
              f"{EVAL_EVERY:,} steps later." if steps else f"\nNot learnt within {args.steps:,} environment steps.")


if __name__ == "__main__":
    main()
