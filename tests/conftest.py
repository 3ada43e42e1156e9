"""A dot on a line, quick enough to run the whole loop on in a second."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
torch.set_num_threads(1)

from envs import Feature, Space, Task  # noqa: E402
from llm import LLM  # noqa: E402
from run import Run  # noqa: E402
from selfalign import Config, train, update_theta  # noqa: E402
from standin import StandIn  # noqa: E402

TASK = Task(
    name="reach",
    goal="Reach the mark and stay there for 3 consecutive steps.",
    features={
        "distance": Feature("m", 0, 2, "from the mark"),
        "speed": Feature("m/s", 0, 2, "of the dot"),
    },
    success=(("distance", "<=", 0.05),),
    steps=3,
    robot="a dot",
    dt=0.1,
    horizon=20,
)
REWARD = """def r(distance, speed, scale=5.0, w=3.0):
    return {'near': np.exp(-distance / scale), 'fast': w * speed}
"""


class Dot:
    """Moves along a line. As an image, it is a bright column."""

    action_space = Space(-1.0, 1.0, (1,), np.float32)
    observation_space = Space(-9.0, 9.0, (2,), np.float32)
    length = 20
    fuse = None  # steps until the process is as good as killed

    def reset(self, seed=None, options=None):
        rng = np.random.default_rng(seed)
        self.x, self.v, self.t, self.held = rng.uniform(-1, 1), 0.0, 0, 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.x, self.v], np.float32)

    def step(self, action):
        if Dot.fuse is not None:
            Dot.fuse -= 1
            if Dot.fuse < 0:
                raise Killed
        self.v = 0.2 * float(action[0])
        self.x, self.t = self.x + self.v, self.t + 1
        self.held = self.held + 1 if abs(self.x) <= 0.05 else 0
        features = {"distance": abs(self.x), "speed": abs(self.v)}
        info = {"features": features, "success": self.held >= 3}
        over = self.t == self.length
        return self.observation(), float(self.held >= 3), False, over, info


class Picture(Dot):
    observation_space = Space(0, 255, (9, 36, 36), np.uint8)

    def observation(self):
        frame = np.zeros((9, 36, 36), np.uint8)
        frame[:, :, int(np.clip(18 + 9 * self.x, 0, 35))] = 255
        return frame


class Killed(BaseException):
    """Ends a run as a kill does: nothing after it is carried out."""


SMALL = dict(seed=5, steps=500, update_every=200, ranked=4, eval_every=100, eval_episodes=2)
SMALL.update(explore=100, noise_end=0.5, noise_steps=500, batch=16, hidden=16)
SMALL.update(workers=False, llm="offline")
SMALL.update(alone=2.0, disagree=-1.0, gain=-1.0)  # whatever the LLM prefers, θ changes


def live(folder, make_env=Dot, backend=None, update=update_theta, replay=None, fuse=None, **values):
    """Lives a small run of the dot in a folder, or resumes it, for at most `fuse` more steps."""
    Dot.fuse, proposal = fuse, folder.parent / "r.py"
    proposal.write_text(REWARD)
    run = Run(folder, resume=(folder / "settings.json").exists())
    values = {**SMALL, "proposal": str(proposal), **run.settings, **values}
    llm = LLM(backend or StandIn(), folder / "llm.jsonl", replay)
    return train(make_env, TASK, llm, run, Config(**values), update)


@pytest.fixture
def go(tmp_path):
    """go(name, ...) lives a small run of the dot in the folder NAME, or resumes it."""
    return lambda name, **values: live(tmp_path / name, **values)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    live(folder)
    return folder


@pytest.fixture(scope="session")
def fixed(tmp_path_factory):
    """The folder of the same run without updates of θ."""
    folder = tmp_path_factory.mktemp("runs") / "fixed"
    live(folder, update=None)
    return folder


def contents(folder):
    """The bytes of all files of a run that two equal runs have in common."""
    left_out = {"settings.json", "llm.jsonl", "checkpoint.pt"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def example(module):
    """The program in a module's docstring."""
    block = r"^    (?:import|from) .*\n(?:    .*\n|\n)*"
    return textwrap.dedent(re.search(block, module.__doc__, re.MULTILINE)[0])


def run_alone(module, program, folder):
    """What a program prints in a folder that holds nothing but the module."""
    shutil.copy(module.__file__, folder)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    return subprocess.check_output(command, cwd=folder, env=clean, text=True)
