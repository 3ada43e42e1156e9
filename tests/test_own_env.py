"""The README's example of an environment and a skill of one's own."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import selfalign
from mh import sample_posterior

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The example run at small size in an empty folder; its names."""
    for name, value in dict(UPDATE_EVERY=600, EVAL_EVERY=200, EVAL_EPISODES=2, EXPLORE_STEPS=100, RANKED=4,
                            BATCH={"state": 16}, AGENT={"state": dict(hidden_dim=16)}, sample_posterior=partial(sample_posterior, steps=(50,))).items():
        monkeypatch.setattr(selfalign, name, value)
    monkeypatch.chdir(tmp_path)
    source = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class PointMass" in code)
    assert "steps=20_000" in source
    namespace = {}
    exec(source.replace("steps=20_000", "steps=1300"), namespace)
    return namespace


def test_a_reward_is_aligned_on_an_environment_of_ones_own(namespace, tmp_path):
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {"metrics.csv", "theta.csv", "policy.pt", "llm.jsonl"}
    exchanges = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "llm.jsonl").read_text().splitlines()]
    assert [exchange["kind"] for exchange in exchanges][0] == "rank"
    question = exchanges[0]["prompt"]
    # Nothing of the arm in PyBullet is in the questions, and nothing is left open.
    for word in ("Panda", "gripper", "block", "$"):
        assert word not in question
    for words in ("Task: brake", "10 times per second; an attempt lasts 40 steps (4 s)", "- distance [m, mostly 0 to 2]"):
        assert words in question
    # With None for the settings, it goes on.
    run = namespace["Run"]("runs/mine", None)
    namespace["train"](namespace["PointMass"], namespace["task"], namespace["LLM"](namespace["StandIn"](), run.exchange), run, steps=1900)
    run.close()
    steps = [int(line.split(",")[0]) for line in (tmp_path / "runs" / "mine" / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(200, 1801, 200))
    env = namespace["PointMass"]()
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape and np.isfinite(obs).all()
