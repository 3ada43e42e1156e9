"""The scripted stand-in."""

import numpy as np
import pytest
from conftest import TASK

from envs import TASKS
from llm import (
    LLM,
    LLMError,
    analyse_question,
    propose_question,
    rank_question,
    read_code,
    read_ranking,
)
from reward import FUNCTIONS, Reward
from standin import EQUAL, StandIn, progress, score

TOUCH = TASKS["touch"]
NAMES = list(TOUCH.features)


def touch(near=0, contact=0, force=0.1, closest=0.15, moved=0.0):
    """An attempt of 50 steps that is near in the last `near` steps, in contact in `contact`."""
    tau = np.zeros((50, len(NAMES)))
    tau[:, NAMES.index("hand_to_block")] = np.linspace(0.2, closest, 50)
    if near:
        tau[-near:, NAMES.index("hand_to_block")] = 0.04
    if contact:
        tau[-contact:, NAMES.index("contact_force")] = force
    tau[-1, NAMES.index("block_displacement")] = moved
    return tau


def ask(question):
    return StandIn()([{"role": "user", "content": question}]).text


def scores(*attempts):
    return [score(TOUCH, tau) for tau in attempts]


def ranking(*attempts, task=TOUCH):
    question = rank_question(task, attempts, progress(LLM(StandIn()), task, attempts))
    return read_ranking(ask(question), len(attempts))


def test_scores():
    near, halfway = scores(touch(20, 0), touch(closest=0.125))
    assert near == pytest.approx(1.0)  # one stage of two, and nothing of the way to the next
    assert halfway == pytest.approx(0.5, abs=0.02)
    half, done, longer = scores(touch(20, 5), touch(20, 10), touch(20, 20))
    assert half == pytest.approx(2.5)  # half of the steps in a row
    assert done == pytest.approx(1 + 1 + 1 + 2 + 0.5 * 10 / 50)
    assert longer - done == pytest.approx(0.5 * 10 / 50)
    # The further a limit is broken, the worse: far below success.
    rough, rougher, moved = scores(touch(20, 15, 4.0), touch(20, 15, 8.0), touch(20, 15, moved=0.2))
    assert (rough, rougher, moved) == pytest.approx((0.5 / 2, 0.5 / 4, 0.5 / 4))


def test_ranking_follows_scores():
    done, near, far, rough = touch(20, 15), touch(20), touch(closest=0.19), touch(20, 15, force=4.0)
    assert ranking(far, rough, done, near) == [[3], [4], [2], [1]]


def test_a_language_model_is_told_no_score():
    assert progress(LLM(lambda messages: None), TOUCH, [touch()]) is None
    with pytest.raises(LLMError, match="progress"):
        ask(rank_question(TOUCH, [touch(), touch()]))


def test_close_scores_are_equal_to_the_best_of_their_group():
    step = 0.9 * EQUAL * 0.15  # of the way of 0.15 m to the first stage
    attempts = [touch(closest=0.10 + i * step) for i in range(3)]
    assert ranking(*attempts) == [[1, 2], [3]]


def test_other_tasks_are_ranked():
    tau = np.column_stack([np.linspace(1.0, 0.0, 20), np.zeros(20)])
    attempts = [tau, tau + [0.5, 0.0]]
    assert ranking(*attempts, task=TASK) == [[1], [2]]


@pytest.mark.parametrize("task", TASKS)
def test_proposals_are_rewards(task):
    source = read_code(ask(propose_question(TASKS[task], FUNCTIONS)))
    params = Reward(source, TASKS[task].features).params
    assert params.get("contact_threshold", 1.0) == 1.0  # the paper's first numbers
    assert params.get("push_weight", 2.0) == 2.0


def test_analyses_change_nothing():
    question = analyse_question(TOUCH, "def r(): ...", [], [touch()], [""], 0.1, [])
    assert '"params": {}' in ask(question)


@pytest.mark.parametrize(
    "messages, words",
    [
        (["What time is it?"], "only knows the questions in prompts/"),
        ([rank_question(TOUCH, [touch()]), "RANKING: 2", "repair"], "only knows"),
        ([propose_question(TASK, FUNCTIONS)], "no first reward for reach.*--proposal"),
    ],
)
def test_what_it_cannot_answer(messages, words):
    with pytest.raises(LLMError, match=words):
        StandIn()([{"role": "user", "content": text} for text in messages])
