"""A run beside the algorithm: the folder it leaves, what it shows on the screen, and watching its policy afterwards."""

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

from drqv2 import DrQV2
from envs import PandaEnv


class Run:
    """The folder of a run: settings.json, metrics.csv, theta.csv, llm.jsonl, reward.py, policy.pt, episodes.npz.

    Rows are appended; other files are written beside and moved into place, so that what stood there survives a failure.
    Each file's content is kept: what cannot be written (a full disk, a folder that is gone) is tried again as a whole with
    the next row, and goes to the temporary folder at the end. Exits with one line where the folder cannot be made or is
    not empty.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.content, self.failed = Path(folder), {}, set()
        self.buffer, self.started = None, time.monotonic()      # the replay buffer, once there is one
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                sys.exit(f"{folder} is not empty: choose another --out, or delete it")
        except OSError as error:
            sys.exit(f"cannot make the folder {folder}: {error.strerror}; choose another --out")
        self.steps, self.measure = settings.get("steps", 0), "sparse return"
        self._row("metrics.csv", "step", "success", "sparse", "return", "critic_loss", "actor_loss", "q")
        self._row("theta.csv", "step", "cause", "name", "value", "low", "high", "rhat", "ess")
        self._write("settings.json", json.dumps(settings, indent=2) + "\n")
        self._write("llm.jsonl", "")

    def proposed(self, reward, change) -> None:
        """The first reward, with the `Change` that it is."""
        self.measure = "R_θ(τ)"
        print("\nThe proposed reward R_θ; its defaults are the initial θ:\n")
        print("    " + reward.source.strip().replace("\n", "\n    ") + "\n", flush=True)
        self.theta(reward, change)

    def theta(self, reward, change) -> None:
        """A new θ: rows of theta.csv, with 90 % intervals and diagnostics where a posterior gave it, and the reward with θ
        as its defaults, as a Python file that works anywhere numpy is."""
        posterior = change.posterior
        rows = [[""] * len(change.theta)] * 4 if posterior is None else [*posterior.interval(0.9), posterior.rhat, posterior.ess]
        for name, value, *rest in zip(change.theta, change.theta.values(), *rows):
            self._row("theta.csv", change.step, change.cause, name, value, *rest)
        self._write("reward.py", f"import numpy as np\n\n\n{reward.source_with(change.theta).strip()}\n")

    def evaluated(self, step: int, success: float, sparse: float, return_: float, losses: dict, agent) -> None:
        """One evaluation: a row of metrics.csv, the policy as it is, a line on the screen.

        `return` is R_θ with the present θ, so it compares evaluations between two changes of θ only; `sparse`, the sum of
        the sparse reward, compares all of them, between runs too.
        """
        self._row("metrics.csv", step, success, sparse, return_, *losses.values())
        state = io.BytesIO()
        torch.save(agent.state_dict(), state)
        self._write("policy.pt", state.getvalue())
        speed = step / (time.monotonic() - self.started)
        left = time.strftime("%H:%M:%S", time.gmtime((self.steps - step) / speed))
        print(f"{step:>8,} steps | success {success:>4.0%} {'█' * round(success * 20):·<20} | {self.measure} {return_:>8.2f} | "
              f"{speed:4.0f} steps/s | at most {left} left", flush=True)

    def exchange(self, exchange: dict) -> None:
        """One question to the LLM and its answer, as a line of JSON."""
        self._append("llm.jsonl", json.dumps(exchange) + "\n")

    def close(self) -> Path:
        """Writes the features of all episodes, and what could not be written before. Returns the folder with everything."""
        if self.buffer is not None:
            content = io.BytesIO()
            np.savez_compressed(content, *(episode.astype(np.float32) for episode in self.buffer.episodes()))
            self._write("episodes.npz", content.getvalue())
        for name in list(self.failed):
            self._write(name, self.content[name])
        if not self.failed:
            return self.folder
        rescue = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-"))
        for name, content in self.content.items():
            (rescue / name).write_bytes(content)
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
            part.unlink(missing_ok=True)
            if name not in self.failed:
                print(f"\n  Cannot write {path}: {error.strerror}. Training goes on and the file is kept in memory; once that is "
                      "put right it will be written.\n", file=sys.stderr, flush=True)
            self.failed.add(name)


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


def play(folder: str, agent_settings: dict, episodes: int, frames: str | None = None, gif: str | None = None) -> None:
    """Shows the policy in a run's folder in a window, or saves it as pictures: PNG files in the folder `frames`, or one moving GIF.

    agent_settings: arguments of DrQV2 by kind of observation. Exits with one line where there is nothing to play or no
    way to show it.
    """
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text())
        state = torch.load(Path(folder) / "policy.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"{folder} holds no finished run to play ({error}); name a folder under runs/")
    if frames or gif:
        try:
            from PIL import Image
        except ImportError:
            sys.exit('saving pictures needs Pillow: pip install ".[pictures]"')
        Path(frames or ".").mkdir(parents=True, exist_ok=True)
    elif sys.platform == "linux" and not os.environ.get("DISPLAY"):
        sys.exit("there is no display to open a window on: add --gif FILE or --frames FOLDER to save pictures instead")
    env, pictures = PandaEnv(settings["task"], settings["obs"], render_mode="rgb_array" if frames or gif else "human"), []
    agent = DrQV2(env.observation_space.shape, env.action_space.shape, **agent_settings[settings["obs"]])
    agent.load_state_dict(state)
    for episode in range(episodes):
        obs, info = env.reset(seed=episode)
        truncated = False
        while not truncated:
            if frames or gif:
                pictures.append(Image.fromarray(env.render()))
            if frames:
                pictures.pop().save(Path(frames) / f"episode{episode}-{env.t:02d}.png")
            obs, _, _, truncated, info = env.step(agent.act(obs, 0, explore=False))
        print(f"episode {episode}: {'success' if info['success'] else 'no success'}", flush=True)
    env.close()
    if gif:
        pictures = [picture.resize((240, 240)).quantize(64) for picture in pictures[::2]]       # a few hundred kilobytes
        pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100, loop=0)
