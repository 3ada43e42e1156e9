"""A run beside the algorithm: the folder it leaves, the checkpoints it goes on from, what it shows on the screen."""

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from reward import Reward, printable

try:
    import fcntl
except ImportError:          # Windows, where nothing keeps two processes apart
    fcntl = None

VERSION = 4      # of checkpoints
NEEDED = {"task": str, "reward": str, "obs": str, "seed": int, "steps": int}      # in settings, to go on with a run


class Screen:
    """A text stream as a terminal may see it: characters that steer one are shown as ?, and nothing that happens to it (a pipe
    that is closed, a full disk behind it) ends the program."""

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")             # θ and █ on a terminal that knows neither

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):       # AttributeError: there is no stream at all
            self.stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class State:
    """All that the rest of a run depends on, at the end of an episode.

    agent, r_theta (None where there is none) and history have `state_dict` and `load_state_dict`; the buffer saves itself
    (see `ReplayBuffer.save`). Of environments it takes Gymnasium's generator, `np_random`, as it was before the episode that
    has just begun: an environment without one goes on with other episodes than it would have.
    """

    def __init__(self, agent, buffer, r_theta, history, env, eval_env, *generators):
        self.step, self.learnt, self.explore_since = 0, False, 0      # exploration's schedule counts from explore_since
        self.buffer, self.env = buffer, env
        self.parts = {"agent": agent, "history": history} | ({"r_theta": r_theta} if r_theta else {})
        self.generators = [*generators, buffer.rng, *filter(None, map(np_random, (eval_env, env)))]
        self.episode_begins()

    def episode_begins(self) -> None:
        """Call before the training environment's `reset`."""
        self.before_reset = np_random(self.env) and np_random(self.env).bit_generator.state

    def state_dict(self) -> dict:
        generators = [generator.bit_generator.state for generator in self.generators]
        if self.before_reset:
            generators[-1] = self.before_reset
        return {"step": self.step, "learnt": self.learnt, "explore_since": self.explore_since, "generators": generators,
                "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.learnt, self.explore_since = (state[name] for name in ("step", "learnt", "explore_since"))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for generator, stands in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = stands
        self.episode_begins()
        torch.set_rng_state(state["torch"])
        for device, stands in enumerate(state["cuda"][:torch.cuda.device_count()]):     # there may be fewer of them now
            torch.cuda.set_rng_state(stands, device)


def np_random(env):
    """Gymnasium's generator of an environment, None where it has none."""
    return getattr(getattr(env, "unwrapped", env), "np_random", None)


class Run:
    """The folder of a run: settings.json, metrics.csv, theta.csv, llm.jsonl, reward.py, policy.pt, episodes.npz, and the
    checkpoint in checkpoint.pt and buffer.bin.

    Rows are appended; other files are written beside and moved into place, so that what stood there survives a failure.
    The content of small files is kept: what cannot be written (a full disk, a folder that is gone) is tried again as a whole
    with the next row, and goes to the temporary folder at the end.

    settings: of a new run, whose folder must be new or empty, as plain values with the names in NEEDED; None goes on with the run
    in `folder`, whose checkpoint is in `saved` then (None: it was cut short before its first). Exits with one line where the
    folder cannot be used.
    """

    def __init__(self, folder: str | Path, settings: dict | None):
        self.folder, self.content, self.failed = Path(folder), {}, set()
        self.state, self.saved, self.answered, self.stopping, self.due = None, None, [], False, False
        self.pieces, self.rows_saved, self.bytes_saved, self.relabelled = [], 0, 0, False       # of buffer.bin
        self.started, self.measure = time.monotonic(), "sparse return"
        try:
            if settings is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                if any(self.folder.iterdir()):
                    sys.exit(f"{folder} is not empty: choose another --out, delete it, or go on with it by --resume {folder}")
            self._lock()
        except OSError as error:
            sys.exit(f"cannot use the folder {folder}: {error.strerror}; " +
                     ("choose another --out" if settings else "name the folder of a run"))
        if settings is None:
            self._open()
        else:
            self.settings = settings
            self._write("settings.json", json.dumps(settings, indent=2) + "\n")
        self.steps = self.settings.get("steps", 0)
        if self.saved is None:
            self._begin()

    def _begin(self):
        self.content = {"settings.json": self.content["settings.json"]}
        self._write("metrics.csv", "")
        self._write("theta.csv", "")
        self._write("llm.jsonl", "")
        self._row("metrics.csv", "step", "success", "sparse", "return", "critic_loss", "actor_loss", "q")
        self._row("theta.csv", "step", "cause", "name", "value", "low", "high", "rhat", "ess")

    def _lock(self):
        """Keeps a second process out of the folder, until this one ends, however it ends."""
        self._held = None
        if fcntl is None:
            return
        self._held = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another process is at work on {self.folder}: wait until it has ended, or choose another folder")

    def _open(self):
        """Reads the run in the folder: its settings, its last checkpoint, and which answers the LLM has given since."""
        try:
            self.content["settings.json"] = (self.folder / "settings.json").read_bytes()
            self.settings = json.loads(self.content["settings.json"])
            if not all(type(self.settings.get(name)) is kind for name, kind in NEEDED.items()):
                raise ValueError(f"settings.json does not say all of {', '.join(NEEDED)}, each a text or a whole number")
            asked = (self.folder / "llm.jsonl").read_bytes() if (self.folder / "llm.jsonl").exists() else b""
            if (self.folder / "checkpoint.pt").exists():
                # weights_only: numbers, texts and tensors, and no code.
                self.saved = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
                if self.saved["version"] != VERSION:
                    raise ValueError(f"checkpoint.pt is of version {self.saved['version']}, this program reads version {VERSION}")
                if any(self.saved["settings"][name] != self.settings[name] for name in ("task", "reward", "obs", "seed")):
                    raise ValueError("checkpoint.pt is of other settings than settings.json")
                self.content.update((name, text.encode()) for name, text in self.saved["files"].items())
                self.pieces, self.rows_saved, self.bytes_saved, *_ = (
                    self.saved[name] for name in ("pieces", "rows", "bytes", "step", "learnt"))
        except Exception as error:                           # a damaged file makes json and torch raise almost anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            sys.exit(f"{self.folder} holds no run that can go on: {reason[0][:200]}")
        begun = self.content.get("llm.jsonl", b"")
        self.exchanges = begun.count(b"\n")                  # with the LLM before the checkpoint
        self.answered = asked[len(begun):].decode(errors="replace").splitlines() if asked.startswith(begun) else []

    def finished(self, steps: int) -> str | None:
        """Why there is nothing to go on with within `steps`; None where there is."""
        if self.saved and self.saved["learnt"]:
            return f"the skill was learnt at {self.saved['history']['evaluations'][-2][0]:,} steps"
        if self.saved and self.saved["step"] >= steps:
            return f"it has had its {steps:,} steps; give it more with --steps"
        return None

    def go_on(self, settings: dict) -> None:
        """With settings that may allow more steps, or name another LLM."""
        self.settings, self.steps = settings, settings["steps"]
        self._write("settings.json", json.dumps(settings, indent=2) + "\n")

    def reward(self, task) -> Reward | None:
        """The present reward of a run that goes on, if it has one."""
        if self.saved is None or "r_theta" not in self.saved:
            return None
        try:
            return Reward(self.saved["r_theta"]["source"], task.features)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"the checkpoint in {self.folder} is damaged: {error}; it cannot go on")

    def restore(self) -> bool:
        """Brings `state` to where the run's checkpoint stands; False for a run that has none. Exits where it cannot be read."""
        if self.saved is None:
            return False
        try:
            self.state.load_state_dict(self.saved)
            with open(self.folder / "buffer.bin", "rb") as file:
                for since, end, names in self.pieces:
                    self.state.buffer.load(file, since, end, tuple(names))
        except Exception as error:                           # a damaged file makes numpy and torch raise almost anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.state = None                                # half restored, and nothing to be kept
            sys.exit(f"the checkpoint in {self.folder} is damaged: {reason[0][:200]}; it cannot go on")
        for name in ("metrics.csv", "theta.csv"):
            self._write(name, self.content[name])
        self.measure = "R_θ(τ)" if "r_theta" in self.saved else self.measure
        print(f"Going on from the checkpoint at {self.state.step:,} steps.\n", flush=True)
        return True

    def checkpoint(self, last: bool = False) -> None:
        """Call at the end of an episode: saves `state` after an evaluation, when it is the last, and when asked to stop.

        The buffer's new rows are appended to buffer.bin; then checkpoint.pt, which says how many of its bytes count, takes
        the place of the last one, so that a crash leaves the one or the other. Where the disk is full, the last one stays.
        Raises KeyboardInterrupt when asked to stop.
        """
        if not (self.due or self.stopping or last):
            return
        path, part, pieces = self.folder / "checkpoint.pt", self.folder / "checkpoint.pt.part", list(self.pieces)
        try:
            with open(self.folder / "buffer.bin", "r+b" if pieces else "wb") as file:
                file.truncate(self.bytes_saved)                       # what a crash or a full disk has left half written
                file.seek(self.bytes_saved)
                rows = self.state.buffer.save(file, self.rows_saved)
                pieces.append([self.rows_saved, rows, list(self.state.buffer.ROWS)])
                if self.relabelled:
                    self.state.buffer.save(file, 0, ("reward",))
                    pieces.append([0, rows, ["reward"]])
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            content = io.BytesIO()                            # torch's own writer hides why it fails
            torch.save({"version": VERSION, "settings": self.settings, "pieces": pieces, "rows": rows, "bytes": size,
                        "files": {name: self.content[name].decode() for name in ("metrics.csv", "theta.csv", "llm.jsonl")},
                        **self.state.state_dict()}, content)
            with open(part, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            self.pieces, self.rows_saved, self.bytes_saved, self.relabelled, self.due = pieces, rows, size, False, False
            self.failed.discard("checkpoint.pt")
        except OSError as error:
            self._cannot_write(path, part, error)
        if self.stopping:
            raise KeyboardInterrupt

    def proposed(self, reward, change) -> None:
        """The first reward, with the `Change` that it is."""
        if self.saved:                                       # a run that goes on has told this already
            return
        self.measure = "R_θ(τ)"
        print_reward("The proposed reward R_θ; its defaults are the initial θ", reward)
        self.theta(reward, change)

    def theta(self, reward, change) -> None:
        """A new θ: rows of theta.csv, with 90 % intervals and diagnostics where a posterior gave it, and the reward with θ
        as its defaults, as a Python file that works anywhere numpy is."""
        posterior = change.posterior
        rows = [[""] * len(change.theta)] * 4 if posterior is None else [*posterior.interval(0.9), posterior.rhat, posterior.ess]
        for name, value, *rest in zip(change.theta, change.theta.values(), *rows):
            self._row("theta.csv", change.step, change.cause, name, value, *rest)
        self.relabelled = True
        self._write("reward.py", reward.python(change.theta))

    def evaluated(self, step: int, success: float, sparse: float, return_: float, losses: dict, policy: bytes) -> None:
        """One evaluation: a row of metrics.csv, the policy that it was of, a line on the screen.

        `return` is R_θ with the present θ, so it compares evaluations between two changes of θ only; `sparse`, the sum of
        the sparse reward, compares all of them, between runs too.
        """
        self.due = True
        self._row("metrics.csv", step, success, sparse, return_, *losses.values())
        self._write("policy.pt", policy)
        lived = max(step, self.state.step if self.state else 0)        # training may be ahead
        speed = (lived - (self.saved["step"] if self.saved else 0)) / (time.monotonic() - self.started)
        seconds = int((self.steps - step) / speed)
        left = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        print(f"{step:>8,} steps | success {success:>4.0%} {'█' * round(success * 20):·<20} | {self.measure} {return_:>8.2f} | "
              f"{speed:4.0f} steps/s | at most {left} left", flush=True)

    def exchange(self, exchange: dict) -> None:
        """One question to the LLM and its answer, as a line of JSON."""
        self._append("llm.jsonl", json.dumps(exchange) + "\n")

    def close(self) -> Path:
        """Writes the features of all episodes, and what could not be written before. Returns the folder with everything."""
        if self.state is not None:
            content = io.BytesIO()
            np.savez_compressed(content, *(episode.astype(np.float32) for episode in self.state.buffer.episodes()))
            self._write("episodes.npz", content.getvalue())
        for name in self.failed & set(self.content):
            self._write(name, self.content[name])
        if self._held is not None:
            os.close(self._held)                             # another process may go on with the folder now
            self._held = None
        if not self.failed & set(self.content):              # of a checkpoint the last one stays
            return self.folder
        try:
            rescue = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-"))
            for name, content in self.content.items():
                (rescue / name).write_bytes(content)
        except OSError as error:
            print(f"Nor can it be written to the temporary folder: {error.strerror}. What {self.folder} holds stays; once there is "
                  "space, --resume goes on from its last checkpoint.", file=sys.stderr)
            return self.folder
        print(f"What could not be written to {self.folder} is in {rescue}.", file=sys.stderr)
        return rescue

    def _row(self, name, *values):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
        self._append(name, line.getvalue())

    def _append(self, name, text):
        old = self.content.get(name, b"")
        self._write(name, old + text.encode(), since=len(old))

    def _write(self, name, content, since=0):
        """Makes `content` that of a file, whose first `since` bytes are there already unless something went wrong."""
        self.content[name] = content = content.encode() if isinstance(content, str) else content
        path, part = self.folder / name, self.folder / (name + ".part")
        try:
            if since and name not in self.failed and path.stat().st_size == since:
                with open(path, "ab") as file:
                    file.write(content[since:])
            else:
                part.write_bytes(content)
                os.replace(part, path)
            self.failed.discard(name)
        except OSError as error:
            self._cannot_write(path, part, error)

    def _cannot_write(self, path, part, error):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if path.name not in self.failed:
            then = ("what cannot be written by the end goes to the temporary folder" if path.name in self.content else
                    "until then the last one stays, from which --resume goes on")
            print(f"\n  Cannot write {path}: {error.strerror or error}. Training goes on, and it is tried again; {then}.\n",
                  file=sys.stderr, flush=True)
        self.failed.add(path.name)


def print_reward(title, reward):
    print(f"\n{title}:\n")
    print("    " + reward.source.strip().replace("\n", "\n    ") + "\n", flush=True)


def print_ranking(ranking, returns, wrong, pairs):
    """ranking: groups of equals. returns: (K,) R_θ of the same trajectories. wrong: (M,) which pairs R_θ orders otherwise."""
    print(f"\n  Ranking {len(returns)} trajectories, best first")
    for who, groups in (("LLM", ranking), ("R_θ", [[i] for i in np.argsort(-returns, kind="stable")])):
        order = " > ".join(" = ".join(str(i + 1) for i in group) for group in groups)
        print(textwrap.fill(order, 100, initial_indent=f"    {who}  ", subsequent_indent=9 * " "))
    print(f"  The LLM orders {len(pairs):,} pairs, and R_θ orders {wrong.sum() / max(1, len(pairs)):.0%} of them otherwise.",
          flush=True)


def print_posterior(posterior, before, after, gain, refused):
    """gain: share of all pairs ranked that `after` orders rightly and `before` does not. refused: why `after` is not taken."""
    chains, draws, _ = posterior.samples.shape
    print(f"\n  Metropolis-Hastings, {chains} chains of {draws:,} draws: acceptance {posterior.acceptance:.2f}, "
          f"R-hat up to {posterior.rhat.max():.3f}, effective sample size from {posterior.ess.min():.0f}")
    print(f"    {'θ':<20} {'before':>10} {'refused' if refused else 'after':>10}   90 % interval")
    for name, low, high in zip(after, *posterior.interval(0.9)):
        print(f"    {name:<20} {before[name]:>10.4g} {after[name]:>10.4g}   {low:.3g} to {high:.3g}")
    print(f"  Of all pairs ranked so far, {100 * abs(gain):.1f} % points {'more' if gain >= 0 else 'fewer'} agree with it"
          + (f"; not taken: {refused}." if refused else "."), flush=True)


def print_analysis(blocked_by, before, params):
    print(f"\n  Asked what blocks the skill, the LLM says: {blocked_by}" + ("" if params else "\n  It changes nothing."))
    for name, value in params.items():
        print(f"    {name:<20} {before[name]:>10.4g} {value:>10.4g}")
