"""What surrounds the algorithm: a run's state, its folder, its worker processes, what it prints.

`State` is what the rest of a run depends on, `Run` the folder that keeps it, and `Worker` a process
that lives episodes. The functions below them print, and `play` shows the policy of a run.
"""

import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch

from drqv2 import DrQV2, Episode, policy, rollout
from envs import PandaEnv

METRICS = "step success sparse return critic_loss actor_loss q"
THETA = "step cause name value low high rhat ess"
STRIDES = (2, 2, 1, 1)  # of the encoder: half the time of DrQ-v2's 2, 1, 1, 1


@dataclass
class Change:
    """A new θ. `stats`, of a posterior: low, high (90 % interval), R-hat and ESS by name."""

    step: int
    cause: str  # proposal, posterior or analysis; rewrite in experiments/rules.py
    source: str  # of the reward, as the LLM wrote it
    theta: dict[str, float]
    prior: dict[str, float]  # centre of the prior for the next update
    stats: dict[str, list] = field(default_factory=dict)

    def __post_init__(self):  # plain numbers, as a checkpoint takes them
        self.theta = {name: float(value) for name, value in self.theta.items()}
        self.prior = {name: float(value) for name, value in self.prior.items()}


@dataclass
class State:
    """What the rest of a run depends on, besides the agent and the replay buffer."""

    step: int = 0  # environment steps lived
    changes: list[Change] = field(default_factory=list)  # of θ, the proposal first
    D: list = field(default_factory=list)  # [K, pairs (better, worse) of episodes] by ranking
    evaluations: list[dict] = field(default_factory=list)  # rows of metrics.csv
    evaluating: tuple | None = None  # step and losses of the evaluation under way
    features: list[np.ndarray] = field(default_factory=list)  # (T, F) of each episode lived

    @property
    def successes(self) -> list[float]:
        return [row["success"] for row in self.evaluations]

    @property
    def learnt(self) -> bool:
        return self.successes[-2:] == [1.0, 1.0]


class Worker:
    """An environment in a process of its own, or in this one. Calls go in and come out in order."""

    def __init__(self, make_env: Callable, parallel: bool):
        self.env = None if parallel else make_env()
        if parallel:
            # Only fork takes environments that are defined in a script or a notebook.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self.pool = ProcessPoolExecutor(1, context, _start, (make_env,))
            self.pool.submit(os.getpid)  # starts the process now, before torch has threads

    def submit(self, function: Callable, *args) -> Future:
        """function(env, *args), as a Future."""
        if self.env is None:
            return self.pool.submit(_call, function, *args)
        return ready(function(self.env, *args))


def _start(make_env):
    global _env
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's business

    def end_with_the_learner():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_learner, daemon=True).start()
    torch.set_num_threads(1)
    _env = make_env()


def _call(function, *args):
    return function(_env, *args)


def ready(value) -> Future:
    future = Future()
    future.set_result(value)
    return future


class RunError(ValueError):
    """The folder of a run cannot be used; the message says why."""


class Run:
    """The folder of a run. Each file is written under another name and renamed, so a kill leaves
    the old one or the new one. Only settings.json, checkpoint.pt and episodes/ are read back.

    Raises RunError for a folder that cannot be used. Nothing is written before `begin`.
    """

    def __init__(self, folder: str | Path, resume: bool = False):
        self.folder, self.settings, self.saved = Path(folder), {}, None
        self.began = (time.monotonic(), 0)  # seconds, steps
        if not resume and self.folder.exists() and os.listdir(self.folder):
            raise RunError(f"{folder} is not empty: choose another --out, or --resume {folder}")
        if resume:
            self._open()

    def _open(self):
        path = self.folder / "checkpoint.pt"
        try:
            self.settings = json.loads((self.folder / "settings.json").read_text())
            if path.exists():  # weights_only: tensors and plain values, no code
                saved = torch.load(path, map_location="cpu", weights_only=True)
                self.saved = {name: saved[name] for name in ("state", "episodes", "agent")}
        except Exception as error:  # a damaged file makes json and torch raise almost anything
            raise RunError(f"{self.folder} holds no run to resume: {error}") from None
        if not self.saved and (self.folder / "metrics.csv").exists():
            raise RunError(f"{path} is gone, so the run cannot resume; its tables stay")

    def begin(self, settings: dict, agent, buffer) -> tuple[State, Future | None]:
        """Writes the settings. Brings agent and buffer to the last checkpoint; returns the state
        there, and the episode that was to come next."""
        state, next_tau = State(), None
        if self.saved:
            try:
                state = State(**self.saved["state"])
                state.changes = [Change(*change) for change in state.changes]
                agent.load_state_dict(self.saved["agent"])
                for number in range(self.saved["episodes"]):
                    episode = self._episode(number)
                    buffer.add(episode, episode.reward)
                    state.features.append(episode.features)
                next_tau = ready(self._episode(len(state.features)))
            except Exception as error:  # a damaged file makes torch and numpy raise almost anything
                raise RunError(f"{self.folder} cannot resume: {error}") from None
            self.began = (time.monotonic(), state.step)
            print(f"Continuing from the checkpoint at {state.step:,} steps.\n", flush=True)
        text = json.dumps(settings, indent=2).encode()
        if self.settings:
            self._write("settings.json", lambda f: f.write(text))
            return state, next_tau
        # The folder of a new run appears whole. The rename fails if another run was faster.
        whole = self.folder.with_name(f".{self.folder.name}")
        (whole / "episodes").mkdir(parents=True, exist_ok=True)
        (whole / "settings.json").write_bytes(text)
        try:
            whole.rename(self.folder)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be made: {error}") from None
        return state, next_tau

    def keep(self, episode: Episode, number: int) -> None:
        """Writes an episode as episodes/NUMBER.npz."""
        arrays = vars(episode)
        self._write(f"episodes/{number:06}.npz", lambda f: np.savez_compressed(f, **arrays))

    def _episode(self, number):
        with np.load(self.folder / f"episodes/{number:06}.npz", allow_pickle=False) as arrays:
            return Episode(**arrays)

    def checkpoint(self, state: State, agent, r_theta, next_tau: Episode) -> None:
        """Saves all that the run continues from, and the files that follow from it."""
        self.keep(next_tau, len(state.features))
        values = {**vars(state), "features": [], "changes": [astuple(x) for x in state.changes]}
        saved = {"state": values, "episodes": len(state.features), "agent": agent.state_dict()}
        if state.evaluating:  # the policy that is being evaluated
            self._write("policy.pt", lambda f: torch.save(agent.greedy.state_dict(), f))
        self._write("checkpoint.pt", lambda f: torch.save(saved, f))
        if r_theta:
            text = r_theta.reward.python(r_theta.theta)
            self._write("reward.py", lambda f: f.write(text.encode()))
        self._csv("metrics.csv", METRICS, [list(row.values()) for row in state.evaluations])
        rows = [
            [change.step, change.cause, name, value, *change.stats.get(name, [""] * 4)]
            for change in state.changes
            for name, value in change.theta.items()
        ]
        self._csv("theta.csv", THETA, rows)

    def _csv(self, name, header, rows):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header.split())
        for row in rows:
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row)
        self._write(name, lambda f: f.write(text.getvalue().encode()))

    def _write(self, name, write):
        path = self.folder / name
        beside = path.with_name(f".{path.name}")
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)

    def evaluated(self, state: State, episodes: list, r_theta) -> None:
        """Adds and shows the row of an evaluation that has ended. Its return is by today's R_θ."""
        success, sparse, features = zip(*episodes)
        returns = r_theta.reward.returns(features)(r_theta.theta) if r_theta else sparse
        values = {"success": success, "sparse": sparse, "return": returns}
        means = {name: float(np.mean(value)) for name, value in values.items()}
        step, losses = state.evaluating
        row = {"step": step, **means, **losses}
        state.evaluations.append(row)
        state.evaluating = None
        began, first = self.began
        speed = (state.step - first) / (time.monotonic() - began)
        bar = "█" * round(20 * row["success"])
        print(
            f"{row['step']:>8,} steps | success {row['success']:>4.0%} {bar:·<20} | "
            f"R_θ(τ) {row['return']:>8.2f} | {speed:4.0f} steps/s",
            flush=True,
        )


def show_ranking(ranking: list, returns: np.ndarray, pairs: int, wrong: float) -> None:
    """ranking: groups of equals, best first. wrong: share of the pairs R_θ orders otherwise.

    A pair of equal returns counts half.
    """
    print(f"\n  Ranking {len(returns)} trajectories, best first")
    for who, groups in (("LLM", ranking), ("R_θ", [[i] for i in np.argsort(-returns)])):
        order = " > ".join(" = ".join(str(i + 1) for i in group) for group in groups)
        print(textwrap.fill(order, 96, initial_indent=f"    {who}  ", subsequent_indent=9 * " "))
    print(
        f"  Of {pairs:,} pairs that the LLM orders, R_θ orders {wrong:.0%} otherwise.", flush=True
    )


def show_posterior(posterior, before: dict, after: dict, gain: float, taken: bool) -> None:
    chains, draws, _ = posterior.samples.shape
    print(
        f"\n  Metropolis-Hastings, {chains} chains of {draws:,} draws: "
        f"acceptance {posterior.acceptance:.2f}, R-hat at most {posterior.rhat.max():.3f}, "
        f"effective sample size at least {posterior.ess.min():.0f}"
        + ("" if posterior.mixed else ": NOT mixed")
    )
    print(f"    {'θ':<20} {'before':>10} {'after':>10}   90 % interval")
    for name, low, high in zip(after, *posterior.interval(0.9)):
        print(
            f"    {name:<20} {before[name]:>10.4g} {after[name]:>10.4g}   {low:.3g} to {high:.3g}"
        )
    verdict = "" if taken else ", so it is not taken"
    print(f"  It orders {100 * gain:.1f} points more of all ranked pairs like the LLM{verdict}.\n")


def show_analysis(blocked_by: str, before: dict, params: dict) -> None:
    print(f"\n  Asked what blocks the skill, the LLM says: {blocked_by}")
    for name, value in params.items():
        print(f"    {name:<20} {before[name]:>10.4g} {value:>10.4g}")
    print("" if params else "  It changes nothing.\n", flush=True)


def free_folder(name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist."""
    number = 1
    while Path(path := name if number == 1 else f"{name}-{number}").exists():
        number += 1
    return Path(path)


def play(folder: str, gif: str | None, episodes: int) -> None:
    """Shows the policy of a run in a window, or saves a moving picture."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        weights = torch.load(Path(folder) / "policy.pt", map_location="cpu", weights_only=True)
        env = PandaEnv(settings["task"], settings["obs"])
        shapes = env.observation_space.shape, env.action_space.shape
        agent = DrQV2(*shapes, hidden_dim=settings["hidden"], strides=STRIDES)
        agent.greedy.load_state_dict(weights)
    except Exception as error:  # a damaged file makes json and torch raise almost anything
        raise ValueError(f"{folder} holds no policy to play: {error}") from None
    if gif and (not gif.endswith(".gif") or Path(gif).exists() or episodes < 1):
        raise ValueError(f"--gif {gif} must be a new file that ends in .gif, of 1 episode or more")
    if gif:
        try:
            from PIL import Image
        except ImportError:
            raise ValueError('--gif needs Pillow: pip install -e ".[gif]"') from None
    elif sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise ValueError("there is no display to open a window on: add --gif FILE")
    env = PandaEnv(env.task, env.obs, "rgb_array" if gif else "human")
    act, frames = policy(agent.greedy), []

    def act_and_film(obs):
        frames.append(env.render())
        return act(obs)

    for number in range(episodes):
        episode = rollout(env, act_and_film, number, tuple(env.task.features))
        print(f"episode {number}: {'success' if episode.success else 'no success'}", flush=True)
    if gif:
        pictures = [Image.fromarray(f).resize((240, 240)).quantize(64) for f in frames[::2]]
        pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100, loop=0)
