"""Learning Reward for Physical Skills using Large Language Model (Zeng & Xu, 2023): Algorithm 1.

    python selfalign.py --task touch                     # a scripted stand-in plays the LLM
    python selfalign.py --play runs/touch-selfalign-1    # watch the policy
    python selfalign.py --resume runs/touch-selfalign-1  # continue a run that was stopped

An LLM writes a parameterised reward R_θ, and DrQ-v2 trains on it. Every 10,000 steps the LLM ranks
some of the robot's trajectories. Where R_θ disagrees, Metropolis-Hastings re-samples θ. If that
yields no better θ, the LLM is asked what blocks the skill. `train` is the algorithm.
"""

import argparse
import copy
import inspect
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from drqv2 import DrQV2, Episode, ReplayBuffer, linear_schedule, policy, rollout
from envs import LONGEST_EPISODE, TASKS, PandaEnv, check_env
from llm import (
    LLM,
    Chat,
    LLMError,
    Manual,
    ReplayError,
    analyse_question,
    propose_question,
    rank_question,
    read_analysis,
    read_code,
    read_ranking,
    service_is_set,
)
from mh import SamplerError, discordance, pairs_of, preference_loss, sample_posterior
from reward import FUNCTIONS, Reward, RTheta
from run import (
    STRIDES,
    Change,
    Run,
    RunError,
    State,
    Worker,
    free_folder,
    play,
    show_analysis,
    show_posterior,
    show_ranking,
)
from standin import StandIn, progress


@dataclass
class Config:
    """Every number of the loop. Every field is a flag of the command line."""

    task: str = "touch"  # one of envs.TASKS
    reward: str = "selfalign"  # selfalign; fixed: the LLM's first reward; sparse: 1 on success
    obs: str = "state"  # state or pixels
    seed: int = 1  # of every random draw
    steps: int = 60_000  # environment steps, at most
    device: str = "cpu"  # of the networks; simulation stays on the CPU
    llm: str = "auto"  # auto, chat, offline, manual or replay:FILE
    model: str = os.environ.get("OPENAI_MODEL", "")  # the LLM's name at the service
    llm_options: dict = field(default_factory=dict)  # JSON: fields to add to every request
    proposal: str = ""  # a file with the first reward, instead of asking
    out: str = ""  # the run's folder; by default runs/TASK-REWARD-SEED
    workers: bool = True  # live and evaluate in processes of their own
    update_every: int = 10_000  # steps between two updates of θ: a period
    ranked: int = 48  # K, trajectories in one ranking
    beta: float = 0.9  # Boltzmann rationality
    disagree: float = 0.1  # R_θ may contradict this share of the ranked pairs
    gain: float = 0.03  # a new θ must order this share more of D's pairs like the LLM
    alone: float = 0.66  # θ is left alone while the last three evaluations average this or more
    eval_every: int = 1_000  # steps between two evaluations
    eval_episodes: int = 20  # in one evaluation
    explore: int = 1_000  # steps of uniform random actions first
    noise_end: float = 0.1  # standard deviation of the exploration noise; it starts at 1
    noise_steps: int = 10_000  # over which the noise falls linearly
    batch: int = 128  # transitions in one update
    lr: float = 1e-3  # Adam's
    hidden: int = 256  # width of actor and critics
    saturation: float = 0.01  # weight of the penalty on the actor's pre-activations, see DrQV2
    average: float = 0.002  # rate at which the greedy policy follows the explorer, see DrQV2

    def __post_init__(self):
        for f in fields(self):
            least = {"seed": 0, "explore": 0, "ranked": 2, "gain": -1, "disagree": -1}
            least = least.get(f.name, 1 if f.type is int else 0)
            if f.type in (int, float) and not least <= getattr(self, f.name) < 2**63:
                raise ValueError(f"--{f.name.replace('_', '-')} must be a number from {least} on")
        if not isinstance(self.llm_options, dict):
            raise ValueError("--llm-options must be a JSON object")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {error}") from None


PIXELS = {"lr": 6e-4, "batch": 64}  # Config's defaults for --obs pixels
EPISODES, EVALUATIONS, UPDATES, RANKINGS = range(4)  # the purpose of a random stream
ANALYSED = 12  # trajectories shown in a failure analysis


def train(make_env: Callable, task, llm: LLM, run: Run, c: Config, update=None) -> int | None:
    """Algorithm 1. Returns the environment steps to 100 % success, or None within `c.steps`.

        R_θ ← the LLM proposes a reward                                      propose
        repeat
            live one episode τ; put it into the replay buffer                live, ReplayBuffer.add
            train DrQ-v2 on the buffer, one update for every second step     DrQV2.update
            every 1,000 steps: evaluate; stop after two perfect evaluations  evaluate
            every 10,000 steps, unless the skill is being learnt:            being_learnt
                T ← K trajectories of the last period                        update_theta, choose
                rank T by the LLM; D ← D ∪ its pairs                         LLM.ask, pairs_of
                if R_θ ranks T otherwise: θ ← p(θ | D), if that is better    align
                if θ is still the same: θ ← what the LLM says blocks it      unblock
                relabel the whole buffer with the new R_θ                    ReplayBuffer.relabel

    make_env: makes an environment that `envs.check_env` accepts for `task`. update: makes a new θ,
    see `update_theta`; None keeps the first one. While the learner makes its updates, one worker
    lives the next episode, with the policy from before these updates, and another evaluates. Every
    draw comes from a generator made from (seed, purpose, number), so nothing depends on timing.
    Raises LLMError without a usable first reward, ValueError for an environment that does not fit.
    """
    env, names, limit = make_env(), tuple(task.features), LONGEST_EPISODE * task.horizon
    random_features = check_env(env, task)
    simulator, evaluator = Worker(make_env, c.workers), Worker(make_env, c.workers)
    torch.manual_seed(c.seed)  # of the networks' first weights
    shapes = env.observation_space.shape, env.action_space.shape
    agent = DrQV2(*shapes, c.device, c.lr, c.hidden, c.saturation, c.average, STRIDES)
    buffer = ReplayBuffer(2 * c.steps + limit, *shapes, len(names), discount=task.discount)

    # R_θ ← the LLM proposes a reward
    proposal = None
    if c.proposal and not run.saved:
        proposal = propose(llm, task, random_features, c.proposal)
    state, next_tau = run.begin(asdict(c), agent, buffer)  # a resumed run: where it stood
    if c.reward != "sparse" and not state.changes:
        state.changes.append(proposal or propose(llm, task, random_features))
    r_theta = critic_reward(task, state, buffer, random_features)

    def live_next():
        network = frozen(agent.explorer) if state.step >= c.explore else None
        key = [c.seed, EPISODES, len(state.features)]
        return simulator.submit(live, network, noise(state.step, c), key, names, limit)

    def evaluate_now():
        key = [c.seed, EVALUATIONS, state.step]
        return evaluator.submit(evaluate, frozen(agent.greedy), key, c.eval_episodes, names, limit)

    def crossed(every):  # whether the episode τ crossed a multiple of `every` steps
        return state.step // every > before // every

    next_tau, evaluation = next_tau or live_next(), state.evaluating and evaluate_now()
    losses = dict.fromkeys(("critic_loss", "actor_loss", "q"), math.nan)  # before any update
    while state.step < c.steps and not state.learnt:
        # live one episode τ with the policy; put it into the replay buffer with its rewards R_θ
        tau, before, std = next_tau.result(), state.step, noise(state.step, c)
        run.keep(tau, len(state.features))
        state.step += len(tau)
        state.features.append(tau.features)
        buffer.add(tau, r_theta(tau.features) if r_theta else tau.reward)
        next_tau = live_next()

        # train DrQ-v2 on the buffer, one update for every second step
        rng = np.random.default_rng([c.seed, UPDATES, len(state.features)])
        generator = torch.Generator(c.device).manual_seed(int(rng.integers(2**31)))
        for _ in range(state.step // 2 - before // 2 if before >= c.explore else 0):
            losses = agent.update(buffer.sample(c.batch, rng), std, generator)

        # every 1,000 steps: evaluate; stop when all 20 episodes succeed, twice in a row
        # (evaluations run in the background and are read one crossing later)
        if evaluation and crossed(c.eval_every):
            run.evaluated(state, evaluation.result(), r_theta)
            evaluation = None

        # every 10,000 steps, unless the skill is being learnt: a new θ
        change = None
        updating = update and crossed(c.update_every) and not state.learnt
        if updating and not being_learnt(state.successes, c):
            rng = np.random.default_rng([c.seed, RANKINGS, state.step])
            change = update(llm, task, state, c, rng)
            state.changes += [change] if change else []
        if change or (tau.terminated and r_theta and r_theta.centre):
            # relabel the whole buffer with the new R_θ, uncentred once an episode has terminated
            r_theta = critic_reward(task, state, buffer, random_features)

        if before >= c.explore and crossed(c.eval_every) and not state.learnt:
            state.evaluating, evaluation = (state.step, losses), evaluate_now()
            run.checkpoint(state, agent, r_theta, next_tau.result())
    if evaluation:
        run.evaluated(state, evaluation.result(), r_theta)
    run.checkpoint(state, agent, r_theta, next_tau.result())
    return state.evaluations[-2]["step"] if state.learnt else None


def noise(step: int, c: Config) -> float:
    """Standard deviation of the exploration noise."""
    return linear_schedule(step, 1.0, c.noise_end, c.noise_steps)


def frozen(network) -> bytes:
    """A copy of a network for another process, which later updates leave alone."""
    return pickle.dumps(copy.deepcopy(network).cpu())


def live(env, network: bytes | None, std: float, key: list, names: tuple, limit: int) -> Episode:
    """The episode with the number in `key`. Without a network, its actions are uniform."""
    rng = np.random.default_rng(key)

    def uniform(obs):
        return rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)

    act = policy(pickle.loads(network), std, rng) if network else uniform
    return rollout(env, act, int(rng.integers(2**31)), names, limit)


def evaluate(env, network: bytes, key: list, episodes: int, names: tuple, limit: int) -> list:
    """[success, sum of the sparse reward, features (T, F)] of episodes of the greedy policy."""
    lived = [live(env, network, 0.0, [*key, i], names, limit) for i in range(episodes)]
    return [(tau.success, tau.reward.sum(), tau.features) for tau in lived]


def being_learnt(successes: list[float], c: Config) -> bool:
    """Whether the last three evaluations average at least `alone`: a new θ would disturb them."""
    return len(successes) > 0 and np.mean(successes[-3:]) >= c.alone


def critic_reward(task, state: State, buffer: ReplayBuffer, random_features) -> RTheta | None:
    """Makes R_θ as the critic sees it and relabels the buffer. None for the sparse reward."""
    if not state.changes:
        return None
    latest = state.changes[-1]
    centre_on = None if buffer.terminal.any() else random_features  # see RTheta
    r_theta = RTheta(Reward(latest.source, task.features), latest.theta, centre_on)
    buffer.relabel(r_theta)
    return r_theta


def propose(llm: LLM, task, random_features: np.ndarray, path: str = "") -> Change:
    """The first θ, from the LLM or from a file. What cannot be used goes back to the LLM."""

    def parse(text):
        reward = Reward(read_code(text), task.features)
        reward.check(reward.named(random_features))
        return Change(0, "proposal", reward.source, reward.params, reward.params)

    if not path:
        return llm.ask("propose", propose_question(task, FUNCTIONS), parse)
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise LLMError(f"--proposal {path} cannot be used: {error}") from None


def update_theta(llm: LLM, task, state: State, c: Config, rng) -> Change | None:
    """One update of θ; None leaves it as it is. Adds the ranking to state.D."""
    latest = state.changes[-1]
    reward = Reward(latest.source, task.features)
    # T ← K trajectories of the last period
    numbers = choose(reward, state, c, rng)
    T = [state.features[i] for i in numbers]
    # rank T by the LLM; D ← D ∪ its pairs
    try:
        # A language model is shown readings alone. The stand-in, a script, needs a score as well.
        question = rank_question(task, T, progress(llm, task, T))
        ranking = llm.ask("rank", question, lambda text: read_ranking(text, len(T)))
    except LLMError as error:
        print(f"\n  The LLM ranks nothing, so θ stays as it is: {error}\n", flush=True)
        return None
    ranking = [[label - 1 for label in group] for group in ranking]
    pairs = pairs_of(ranking)
    state.D.append([len(T), np.take(numbers, pairs).tolist()])
    # if R_θ ranks T otherwise: θ ← p(θ | D), if that is better
    returns = reward.returns(T)(latest.theta)
    wrong = float(discordance(returns, pairs))
    show_ranking(ranking, returns, len(pairs), wrong)
    disagrees = len(pairs) > 0 and wrong > c.disagree
    change = align(reward, state, c, rng) if disagrees else None
    # if θ is still the same: θ ← what the LLM says blocks the skill
    return change or unblock(llm, task, reward, state, T, wrong)


def choose(reward: Reward, state: State, c: Config, rng) -> list[int]:
    """Numbers of K episodes of the last period, evenly in order of R_θ, then shuffled."""
    lengths = np.cumsum([len(episode) for episode in reversed(state.features)])
    count = max(2, int((lengths <= c.update_every).sum()))
    recent = np.arange(len(state.features))[-count:]
    returns = reward.returns([state.features[i] for i in recent])(state.changes[-1].theta)
    places = np.unique(np.linspace(0, len(recent) - 1, c.ranked).round().astype(int))
    return rng.permutation(recent[np.argsort(returns)[places]]).tolist()


def align(reward: Reward, state: State, c: Config, rng) -> Change | None:
    """θ ← p(θ | D) by Metropolis-Hastings, see mh.py and `Posterior.estimate`.

    None unless the new θ orders more of D's pairs like the LLM than the present one does.
    """
    latest = state.changes[-1]
    # A ranking of K says about as much as K − 1 pairs, so its pairs weigh 2 / K.
    weights = np.concatenate([np.full(len(pairs), 2 / K) for K, pairs in state.D])
    numbers, pairs = np.unique([p for _, pairs in state.D for p in pairs], return_inverse=True)
    R, pairs = reward.returns([state.features[i] for i in numbers]), pairs.reshape(-1, 2)

    def log_likelihood(theta):
        returns = R({name: theta[:, [i]] for i, name in enumerate(latest.prior)})
        loss = preference_loss(returns, pairs, weights, c.beta)
        # An infinite return would seem to explain every preference for its trajectory.
        return np.where(np.isfinite(returns).all(axis=-1), -loss, -np.inf)

    try:
        posterior = sample_posterior(log_likelihood, list(latest.prior.values()), rng=rng)
    except SamplerError as error:
        print(f"\n  No posterior: {error}", flush=True)
        return None
    theta = dict(zip(latest.prior, posterior.estimate(log_likelihood).tolist()))
    gain = float(discordance(R(latest.theta), pairs) - discordance(R(theta), pairs))
    taken = gain > c.gain
    show_posterior(posterior, latest.theta, theta, gain, taken)
    if not taken:
        return None
    stats = zip(*posterior.interval(0.9).tolist(), posterior.rhat.tolist(), posterior.ess.tolist())
    stats = dict(zip(theta, map(list, stats)))
    return Change(state.step, "posterior", latest.source, theta, latest.prior, stats)


def unblock(llm: LLM, task, reward: Reward, state: State, T: list, wrong: float) -> Change | None:
    """θ ← what the LLM says blocks the skill; None when it changes nothing."""
    latest, R = state.changes[-1], reward.returns(T)
    order = np.argsort(-R(latest.theta))
    order = order[np.unique(np.linspace(0, len(T) - 1, ANALYSED).round().astype(int))]
    shown = [T[i] for i in order]
    rounded = {name: float(f"{value:.4g}") for name, value in latest.theta.items()}
    question = analyse_question(
        task,
        reward.source_with(rounded),
        [(change.step, change.cause, change.theta) for change in state.changes],
        shown,
        [pay_note(reward, latest.theta, tau) for tau in shown],
        wrong,
        [(row["step"], row["success"]) for row in state.evaluations],
    )

    def parse(text):
        blocked_by, params = read_analysis(text, latest.theta)
        if not np.isfinite(R({**latest.theta, **params})).all():
            raise ValueError("with these values the reward is not finite: choose others")
        return blocked_by, params

    try:
        blocked_by, params = llm.ask("analyse", question, parse)
    except LLMError as error:
        print(f"\n  No analysis: {error}\n", flush=True)
        return None
    # The LLM was shown rounded values. One within 1 % of the present one is a repetition.
    params = {name: v for name, v in params.items() if not np.isclose(v, latest.theta[name], 1e-2)}
    show_analysis(blocked_by, latest.theta, params)
    if not params:
        return None
    theta = {**latest.theta, **params}
    return Change(state.step, "analysis", latest.source, theta, {**latest.prior, **params})


def pay_note(reward: Reward, theta: dict, tau: np.ndarray) -> str:
    """What r_θ pays per step of a trajectory, and for what."""
    terms = reward.terms(reward.named(tau), theta)
    parts = " + ".join(f"{term.mean():.3g} ({name})" for name, term in terms.items())
    return f"reward per step {sum(terms.values()).mean():.3g} = {parts}"


def JSON(text: str):
    return json.loads(text)


def read_flags() -> tuple[argparse.Namespace, dict]:
    """The command line, and the fields of Config that it gives."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    notes = dict(re.findall(r"(\w+): .*?# (.*)", inspect.getsource(Config)))
    rewards, observations = ("selfalign", "fixed", "sparse"), ("state", "pixels")
    choices = {"task": TASKS, "reward": rewards, "obs": observations}
    for f in fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), JSON if f.type in (bool, dict) else f.type
        default = "{}" if f.type is dict else f.default
        words = {"choices": choices.get(f.name), "help": f"{notes.get(f.name, '')} ({default})"}
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, **words)
    former = parser.add_mutually_exclusive_group()
    former.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    former.add_argument("--play", metavar="RUN", help="show the policy of the run in this folder")
    parser.add_argument("--gif", metavar="FILE", help="with --play: save a moving picture")
    parser.add_argument("--episodes", type=int, default=5, help="with --play (default: 5)")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    free = {"steps", "device", "llm", "model", "llm_options", "workers"} if args.resume else set()
    if (args.play or args.resume) and set(given) - free:
        flag, mode = min(set(given) - free).replace("_", "-"), "play" if args.play else "resume"
        parser.error(f"--{flag} does not go with --{mode}: leave it out")
    if args.gif and not args.play:
        parser.error("--gif goes with --play RUN")
    return args, given


def choose_llm(c: Config, run: Run) -> LLM:
    """The LLM that c.llm names. Raises LLMError for one that cannot be used."""
    replay = c.llm.removeprefix("replay:") if c.llm.startswith("replay:") else None
    if c.llm == "chat":
        backend = Chat(c.model, c.llm_options)
    elif c.llm in ("offline", "manual"):
        backend = StandIn() if c.llm == "offline" else Manual()
    elif replay:
        backend = None
    else:
        raise LLMError(f"unknown --llm {c.llm}: auto, chat, offline, manual or replay:FILE")
    print(f"LLM: {backend.words if backend else f'none, answers come from {replay}'}", flush=True)
    return LLM(backend, run.folder / "llm.jsonl", replay)


def start(args: argparse.Namespace, given: dict) -> tuple[Config, Run, LLM | None]:
    """The run to begin or to resume, and its LLM. Writes nothing."""
    if args.resume:
        run = Run(args.resume, resume=True)
        kept = {f.name: run.settings[f.name] for f in fields(Config) if f.name in run.settings}
        c = Config(**{**kept, **given})
    else:
        c = Config(**{**(PIXELS if given.get("obs") == "pixels" else {}), **given})
        run = Run(c.out or free_folder(f"runs/{c.task}-{c.reward}-{c.seed}"))
    if c.llm == "auto":
        c.llm = "chat" if service_is_set() else "offline"
    print(f"Task: {c.task}. {TASKS[c.task].goal}\nReward: {c.reward}. Folder: {run.folder}")
    asks = c.reward == "selfalign" or (c.reward == "fixed" and not c.proposal)
    return c, run, choose_llm(c, run) if asks else None


def main():
    args, given = read_flags()
    try:
        if args.play:
            return play(args.play, args.gif, args.episodes)
        c, run, llm = start(args, given)
    except (ValueError, OSError, LLMError) as error:
        sys.exit(f"selfalign: {error}")
    if c.obs == "state":
        torch.set_num_threads(1)  # networks this small lose time to a second thread
    make_env = partial(PandaEnv, c.task, c.obs)
    update = update_theta if c.reward == "selfalign" else None
    resume = f"python selfalign.py --resume {run.folder}"
    try:
        steps = train(make_env, TASKS[c.task], llm, run, c, update)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. Continue:  {resume}")
    except (ReplayError, RunError, FloatingPointError) as error:
        sys.exit(f"\nselfalign: {error}")
    except (LLMError, OSError, BrokenProcessPool) as error:
        hint = f". Continue:  {resume}" if run.folder.exists() else ""
        sys.exit(f"\nselfalign: {error}{hint}")
    learnt = f"is learnt: 100 % at {steps} environment steps, and again at the next evaluation"
    print(f"\n{c.task} {learnt if steps else f'was not learnt within {c.steps:,} steps'}")
    if (run.folder / "policy.pt").exists():
        print(f"Watch it:  python selfalign.py --play {run.folder}")


if __name__ == "__main__":
    main()
