"""What a real large language model answered to the prompts, kept verbatim in tests/replies."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import selfalign
from envs import TASKS
from llm import Offline, read_analysis, read_code, read_ranking
from reward import Reward

REPLIES = Path(__file__).parent / "replies"
PROGRESS = json.loads((REPLIES / "progress.json").read_text())


@pytest.mark.parametrize("path", sorted(REPLIES.glob("propose-*.md")), ids=lambda path: path.stem)
def test_first_proposals_compile_without_repair(path):
    task = path.stem.split("-")[1]
    features = selfalign.random_features(task)
    reward = Reward(read_code(path.read_text()), TASKS[task].features)
    reward.check(features)
    assert all(value > 0 for value in reward.params.values())
    # In chains as in single steps.
    theta = {name: np.array([[value], [2 * value]]) for name, value in reward.params.items()}
    np.testing.assert_allclose(reward.total(features, theta)[0], reward.total(features))


def agreement(groups, progress):
    """(agreeing, opposed, tied) pairs of a ranking among those whose true progress differs."""
    place = {label - 1: rank for rank, group in enumerate(groups) for label in group}
    pairs = [(i, j) for i, a in enumerate(progress) for j, b in enumerate(progress) if a > b]
    signs = [np.sign(place[j] - place[i]) for i, j in pairs]
    return signs.count(1), signs.count(-1), signs.count(0)


@pytest.mark.parametrize("path", sorted(REPLIES.glob("rank-*.md")), ids=lambda path: path.stem)
def test_rankings_are_read_and_agree_with_true_progress(path):
    progress = PROGRESS[path.name[len("rank-"):].split(".")[0]]
    agreeing, opposed, _ = agreement(read_ranking(path.read_text(), len(progress)), progress)
    assert agreeing > 2 * opposed


def test_rankings_agree_with_true_progress_over_all():
    total = np.zeros(3, int)
    for path in REPLIES.glob("rank-*.md"):
        progress = PROGRESS[path.name[len("rank-"):].split(".")[0]]
        total += agreement(read_ranking(path.read_text(), len(progress)), progress)
    assert total[0] / (total[0] + total[1]) > 0.85


@pytest.mark.parametrize("name", PROGRESS)
def test_the_stand_in_reads_real_prompts_and_agrees_too(name):
    question = (REPLIES / f"rank-{name}.prompt.txt").read_text()
    groups = read_ranking(Offline()([{"role": "user", "content": question}]).text, len(PROGRESS[name]))
    agreeing, opposed, _ = agreement(groups, PROGRESS[name])
    assert agreeing > 2 * opposed


@pytest.mark.parametrize("path", sorted(REPLIES.glob("analyse-*.md")), ids=lambda path: path.stem)
def test_analyses_are_read(path):
    question = (REPLIES / f"{path.name.split('.')[0]}.prompt.txt").read_text()
    code = re.search(r"```python\n(.*?)```", question, re.DOTALL)[1]
    params = Reward(code, TASKS[path.stem.split("-")[1]].features).params
    blocked_by, changes = read_analysis(path.read_text(), params)
    assert blocked_by and any(params[name] != value for name, value in changes.items())
