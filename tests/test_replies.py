"""What a real large language model answered to the prompts, kept verbatim in tests/replies."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import selfalign
from envs import TASKS, PandaEnv
from llm import prompt, read_analysis, read_code, read_ranking
from questions import describe_attempt
from reward import Reward
from standin import STAGES, StandIn

REPLIES = Path(__file__).parent / "replies"
PROGRESS = json.loads((REPLIES / "progress.json").read_text())


@pytest.mark.parametrize("path", sorted(REPLIES.glob("propose-*.md")), ids=lambda path: path.stem)
def test_first_proposals_compile_without_repair(path):
    task = path.stem.split("-")[1]
    features = dict(zip(TASKS[task].features, selfalign.random_features(PandaEnv(task), TASKS[task]).T))
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


@pytest.mark.parametrize("path", sorted(REPLIES.glob("analyse-*.md")), ids=lambda path: path.stem)
def test_analyses_are_read(path):
    question = (REPLIES / f"{path.name.split('.')[0]}.prompt.txt").read_text()
    code = re.search(r"```python\n(.*?)```", question, re.DOTALL)[1]
    params = Reward(code, TASKS[path.stem.split("-")[1]].features).params
    blocked_by, changes = read_analysis(path.read_text(), params)
    assert blocked_by and any(params[name] != value for name, value in changes.items())


def attempts_that_reach(task, stage):
    """Descriptions of three attempts whose second half has the typical readings of a stage, 0 being the start."""
    readings = {name: value for change in STAGES[task][:stage + 1] for name, value in change.items()}
    series = {name: np.repeat([STAGES[task][0][name], readings[name]], 25) for name in TASKS[task].features}
    return "\n\n".join(describe_attempt(i + 1, series, TASKS[task]) for i in range(3))


def scripted_analysis(task, code, attempts):
    question = prompt("analyse", task=task, goal=TASKS[task].goal, features="", reward=code, trajectories=attempts)
    text = StandIn()([{"role": "user", "content": question}]).text
    return read_analysis(text, Reward(code, TASKS[task].features).params)


@pytest.mark.parametrize("path", sorted(REPLIES.glob("propose-*.md")), ids=lambda path: path.stem)
def test_the_stand_in_analyses_rewards_that_it_did_not_write(path):
    task, code = path.stem.split("-")[1], read_code(path.read_text())
    reward, stages = Reward(code, TASKS[task].features), STAGES[task]
    # The same reward with names that say nothing.
    bare, number = code, {name: f"p{i}" for i, name in enumerate(reward.params)}
    for name in reward.params:
        bare = re.sub(rf"\b{name}\b", number[name], bare)
    readings = [{name: value for change in stages[:k + 1] for name, value in change.items()} for k in range(len(stages))]
    halves = [{name: (one[name] + other[name]) / 2 for name in one} for one, other in zip(readings, readings[1:])]

    def gains(params, blocked):
        """What going on to each stage pays or costs, up to the blocked one: the mean of all of the way and twice its first half."""
        at, halfway = ([float(reward.total(features, params)) for features in some] for some in (readings, halves))
        return np.array([(at[k + 1] - at[k] + 2 * (halfway[k] - at[k])) / 2 for k in range(blocked + 1)])

    def share(params, blocked):
        return gains(params, blocked)[-1] / np.abs(gains(params, blocked)).sum()

    for blocked, attempts in [(0, "")] + [(k, attempts_that_reach(task, k)) for k in range(len(stages) - 1)]:
        why, changes = scripted_analysis(task, code, attempts)
        assert why and len(changes) <= 3
        now = share({}, blocked)
        tried = {(name, factor): {name: factor * value} for factor in (3.0, 0.3, 10.0, 0.1)
                 for name, value in reward.params.items()}
        help_ = {key: share(change, blocked) for key, change in tried.items()
                 if gains(change, blocked)[-1] > gains({}, blocked)[-1] + 1e-9}
        enough = [factor for (_, factor), after in help_.items() if after >= 0.3]
        assert (f"stage {blocked + 1} " in why and "too little" in why) == (now < 0.3)
        best = max(help_.values(), default=0)
        assert bool(changes) == (now < 0.3 and (bool(enough) or best >= now + 0.05))
        if changes:
            assert gains(changes, blocked)[-1] > gains({}, blocked)[-1]
        if changes and enough:                                        # one is enough, by the mildest factor
            (name, value), = changes.items()
            assert share(changes, blocked) >= 0.3 - 1e-3 and value == pytest.approx(reward.params[name] * enough[0], rel=0.01)
        elif changes:                                                 # further ones only where they help
            assert share(changes, blocked) >= best - 0.01 + 0.05 * (len(changes) - 1)
        assert scripted_analysis(task, bare, attempts) == (why, {number[name]: value for name, value in changes.items()})
