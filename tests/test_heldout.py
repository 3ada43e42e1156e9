"""An update of θ judged without training, on episodes so simple that every number can be told by heart."""

import json
import math
import sys
from functools import partial

import numpy as np
import pytest

import heldout
import selfalign
from envs import TASKS
from llm import prompt, read_code
from mh import SamplerError, sample_posterior
from reward import Reward, RewardError

TOUCH = TASKS["touch"]
NAMES = list(TOUCH.features)
CODE = """def r(contact_force, weight=1.0, least=1.0):
    return {'contact': weight * np.where(contact_force > least, 1.0, 0.0)}"""


def touching(count, force=0.1):
    """An episode with contact in its last `count` steps, the hand near the block all the time."""
    episode = np.zeros((50, len(NAMES)))
    episode[:, NAMES.index("hand_to_block")] = 0.04
    episode[50 - count:, NAMES.index("contact_force")] = force
    return episode


def test_scores_are_the_stand_ins_with_the_steps_that_the_task_takes():
    far = np.zeros((50, len(NAMES)))
    far[:, NAMES.index("hand_to_block")] = np.linspace(0.15, 0.1, 50)               # half the way to 0.05
    scores = heldout.scores_of(TOUCH, [touching(4), far, touching(0), touching(25)])
    # near: 1, contact: 1, for 4 of the 10 steps; half of the first; near only; fulfilled for 25 steps of 50
    np.testing.assert_allclose(scores, [2.4, 0.5, 1.0, 1 + 1 + 1 + 2 + 0.25])


def rewarded(values):
    """Episodes of one step each with that R_θ, for `PLAIN`."""
    return [np.array([[value]]) for value in values]


PLAIN = Reward("def r(x, w=1.0):\n    return {'a': w * x}", ["x"])


@pytest.mark.parametrize("scores, values, share", [
    ([3, 2, 1], [3, 2, 1], 1.0), ([3, 2, 1], [1, 2, 3], 0.0), ([3, 2, 1], [3, 1, 2], 2 / 3), ([3, 2, 1], [2, 2, 1], 2.5 / 3),
    ([3, 2, 1], [0, 0, 0], 0.5), ([3, 2.95, 1], [1, 2, 0], 1.0),                     # 3 and 2.95 are the same to the stand-in
    ([1, 3, 2], [1, 3, 2], 1.0), ([1, 1.05, 1], [1, 2, 3], math.nan), ([1], [1], math.nan)])
def test_accuracy_is_the_share_of_clear_pairs_that_the_reward_orders_rightly(scores, values, share):
    found = heldout.accuracy(PLAIN, PLAIN.params, rewarded(values), np.array(scores, float))
    assert found == pytest.approx(share, nan_ok=True)
    if share not in (0.5, 2.5 / 3):                                   # θ counts, not the reward's defaults
        turned = heldout.accuracy(PLAIN, {"w": -1.0}, rewarded(values), np.array(scores, float))
        assert turned == pytest.approx(1 - share, nan_ok=True)


@pytest.fixture
def judge(monkeypatch):
    """judge(episodes, reward, ...): heldout.judge with periods of 12 episodes, 4 of which are ranked."""
    for module in (heldout, selfalign):
        monkeypatch.setattr(module, "UPDATE_EVERY", 12 * 50)
    monkeypatch.setattr(selfalign, "RANKED", 4)
    monkeypatch.setattr(selfalign, "sample_posterior", partial(sample_posterior, steps=(300,)))

    def run(episodes, *seed, scores=None, **theta):
        reward = Reward(CODE, NAMES)
        scores = heldout.scores_of(TOUCH, episodes) if scores is None else np.asarray(scores, float)
        return heldout.judge(TOUCH, reward, {**reward.params, **theta}, episodes, scores, *seed)
    return run


MANY = [touching(count) for count in (0, 9, 3, 6, 2, 8, 1, 7, 4, 9, 5, 0, 3, 8, 2)]


def test_an_update_that_is_taken_makes_the_other_episodes_agree(judge):
    result = judge(MANY)                                              # no contact reaches 1 N: R_θ sees no difference
    assert [result[f"{kind}_before"] for kind in ("T", "held", "late")] == [0.5] * 3
    assert [result[f"{kind}_after"] for kind in ("T", "held", "late")] == [1.0] * 3
    assert result["taken"] == 1 and result["rhat"] < 1.05 and result["ess"] > 200
    assert judge(MANY, 0) == result != judge(MANY, 1)                 # the same seed gives the same


def test_where_the_rankings_agree_nothing_changes_and_nothing_is_sampled(judge, monkeypatch):
    monkeypatch.setattr(heldout, "sample_theta", lambda *args: pytest.fail("there is nothing to correct"))
    result = judge(MANY, least=0.05)
    assert [result[f"{kind}_{when}"] for kind in ("T", "held", "late") for when in ("before", "after")] == [1.0] * 6
    assert result["taken"] == 0 and math.isnan(result["rhat"]) and math.isnan(result["ess"])


@pytest.mark.parametrize("opposed, sampled", [(1, False), (2, True)])
def test_a_tenth_of_the_pairs_may_be_opposed_as_in_the_loop(opposed, sampled, judge, monkeypatch):
    monkeypatch.setattr(selfalign, "RANKED", 5)                       # ten pairs

    def rank(llm, task, T):
        order = list(np.argsort([-(episode[:, NAMES.index("contact_force")] > 0).sum() for episode in T]))
        for place in (0, 2)[:opposed]:                                # neighbours change places
            order[place:place + 2] = order[place + 1], order[place]
        return [[int(i)] for i in order]
    monkeypatch.setattr(heldout, "rank_attempts", rank)
    asked = []

    def sample(*args):
        asked.append(args)
        raise SamplerError("enough is known")
    monkeypatch.setattr(heldout, "sample_theta", sample)
    episodes = [touching(count) for count in range(12)]
    if sampled:
        with pytest.raises(SamplerError):
            judge(episodes, least=0.05)
    else:
        judge(episodes, least=0.05)
    assert len(asked) == sampled


@pytest.mark.parametrize("mixed, gain, taken", [(True, 0.031, 1), (True, 0.03, 0), (False, 0.5, 0)])
def test_a_posterior_is_taken_only_where_the_loop_would_take_it(mixed, gain, taken, judge, monkeypatch):
    class Sampled:
        rhat, ess = np.array([1.0, 1.04]), np.array([500.0, 300.0])
    Sampled.mixed = mixed
    monkeypatch.setattr(heldout, "sample_theta", lambda *args: Sampled)
    monkeypatch.setattr(heldout, "estimate", lambda *args: ({"weight": 1.0, "least": 0.05}, gain))
    result = judge(MANY)
    assert (result["taken"], result["rhat"], result["ess"]) == (taken, 1.04, 300.0)         # the worst of both parameters
    assert result["held_before"] == 0.5 and result["held_after"] == (1.0 if taken else 0.5)


@pytest.fixture
def compared(judge, monkeypatch):
    """compared(count): of so many episodes, the numbers of those of each kind, and of those that were ranked."""
    def run(count):
        seen, ranked = [], []

        def accuracy(reward, theta, some, scores):
            numbers = [int(episode[0, -1]) for episode in some]
            assert scores.tolist() == numbers                         # each with its own score
            seen.append(numbers)
            return 1.0

        def rank(llm, task, T):
            ranked.extend(int(episode[0, -1]) for episode in T)
            return real(llm, task, T)
        real = selfalign.rank_attempts
        monkeypatch.setattr(heldout, "accuracy", accuracy)
        monkeypatch.setattr(heldout, "rank_attempts", rank)
        episodes = [touching(i % 10) for i in range(count)]
        for i, episode in enumerate(episodes):
            episode[:, -1] = i                                        # its number, as the block's speed
        judge(episodes, scores=range(count), least=0.05)
        assert seen[::2] == seen[1::2]                                # before the update and after it
        return seen[::2], ranked
    return run


def test_what_is_compared_is_what_was_not_ranked(compared):
    (T, held, late), ranked = compared(17)
    assert T == ranked and len(set(T)) == 4 and max(T) < 12           # of the first period only
    assert held == [i for i in range(6, 12) if i not in T]            # the rest of its second half
    assert late == [12, 13, 14, 15, 16]
    assert len(compared(12)[0]) == 2                                  # nothing came after it


def test_no_more_are_compared_than_is_bearable(compared, monkeypatch):
    monkeypatch.setattr(heldout, "MOST", 3)
    (_, held, late), ranked = compared(33)
    assert held == [i for i in range(6, 12) if i not in ranked][:3]
    assert late == [12, 22, 32]                                       # evenly, the last among them
    monkeypatch.setattr(heldout, "MOST", 4)
    assert compared(19)[0][2] == [12, 14, 16, 18]


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """main(*flags): heldout.py on a run of 200 short episodes whose judgement is `judged`; returns (out, err) by lines."""
    (tmp_path / "settings.json").write_text(json.dumps({"task": "touch"}))
    np.savez_compressed(tmp_path / "episodes.npz", *[np.full((2, len(NAMES)), i, np.float32) for i in range(200)])
    monkeypatch.setattr(heldout, "scores_of", lambda task, episodes:
                        np.array([len(episodes), episodes[199][0, 0], task is TOUCH]))

    def run(*flags, judged=None, folder=tmp_path):
        def judge(task, reward, theta, episodes, scores, *rest):
            assert task is TOUCH and scores.tolist() == [200, 199, 1] and episodes[10].dtype == float
            return judged(theta)
        monkeypatch.setattr(heldout, "judge", judge)
        monkeypatch.setattr(sys, "argv", ["heldout.py", str(folder), *flags])
        heldout.main()
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines()
    return run


def result_of(values, taken=1, rhat=1.01, ess=300.0):
    names = ("T_before", "T_after", "held_before", "held_after", "late_before", "late_after")
    return {"taken": taken, "rhat": rhat, "ess": ess, **dict(zip(names, values))}


HEAD = "run,proposal,parameter,factor,T_before,T_after,held_before,held_after,late_before,late_after,taken,rhat,ess"


def test_one_reward_is_one_row_and_a_summary(main, tmp_path):
    asked = []
    out, err = main(judged=lambda theta: asked.append(theta) or result_of([0.5, 0.75, 0.6, 0.9, 0.7, 0.65]))
    assert out == [HEAD, f"{tmp_path},(stand-in),,1,0.5,0.75,0.6,0.9,0.7,0.65,1,1.01,300"]
    assert err == ["mean of 1: T 0.500 -> 0.750, held 0.600 -> 0.900, late 0.700 -> 0.650; "
                   "worst change held +0.300, late -0.050; taken 100%; R-hat up to 1.010, effective sample size from 300"]
    assert asked == [Reward(read_code(prompt("offline/touch")), NAMES).params]


def test_wrong_numbers_are_each_tenfold_and_a_tenth_beside_the_reward_as_it_is(main, tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.md").write_text("So:\n```python\ndef r(contact_force, w=3.0):\n    return {'a': w * contact_force}\n```")
    asked = []

    def judged(theta):
        asked.append(theta)
        by = len(asked)                                               # the values of this row
        return result_of([0.1 * by, 0.2, 0.3, 0.3 + 0.01 * by, 0.6, 0.6 - 0.01 * by], by % 2, 1 + by / 100, 100.0 * by)
    out, err = main(str(tmp_path / "a.py"), str(tmp_path / "b.md"), "--wrong", judged=judged)
    assert asked == [{"weight": 1, "least": 1}, {"weight": 10, "least": 1}, {"weight": 0.1, "least": 1}, {"weight": 1, "least": 10},
                     {"weight": 1, "least": 0.1}, {"w": 3}, {"w": 30}, {"w": pytest.approx(0.3)}]
    assert [line.split(",")[1:4] for line in out[1:]] == [
        ["a.py", "", "1"], ["a.py", "weight", "10"], ["a.py", "weight", "0.1"], ["a.py", "least", "10"], ["a.py", "least", "0.1"],
        ["b.md", "", "1"], ["b.md", "w", "10"], ["b.md", "w", "0.1"]]
    assert out[3].split(",")[4:] == ["0.3", "0.2", "0.3", "0.33", "0.6", "0.57", "1", "1.03", "300"]
    assert err == ["mean of 8: T 0.450 -> 0.200, held 0.300 -> 0.345, late 0.600 -> 0.555; "
                   "worst change held +0.010, late -0.080; taken 50%; R-hat up to 1.080, effective sample size from 100"]
    # What is not there counts for nothing.
    nan = math.nan
    results = iter([result_of([0.5, 0.5, 0.5, 0.5, nan, nan], 0, nan, nan), result_of([0.7, 0.7, 0.7, 0.8, 0.9, 1.0])])
    out, err = main(str(tmp_path / "a.py"), str(tmp_path / "b.md"), judged=lambda theta: next(results))
    assert out[1].endswith(",0.5,0.5,nan,nan,0,nan,nan")
    assert err == ["mean of 2: T 0.600 -> 0.600, held 0.600 -> 0.650, late 0.900 -> 1.000; "
                   "worst change held +0.000, late +0.100; taken 50%; R-hat up to 1.010, effective sample size from 300"]


@pytest.mark.filterwarnings("error")
def test_the_summary_leaves_out_what_there_is_none_of(main, tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    _, err = main(str(tmp_path / "a.py"), judged=lambda theta: result_of([0.5, 0.5, 0.5, 0.6] + 2 * [math.nan], 0, math.nan, math.nan))
    assert err == ["mean of 1: T 0.500 -> 0.500, held 0.500 -> 0.600; worst change held +0.100; taken 0%"]


@pytest.mark.filterwarnings("error")
def test_where_nothing_is_ranked_nothing_is_said_to_disagree(judge):
    same = judge([touching(3)] * 15)
    assert same["taken"] == 0 and all(math.isnan(same[f"{kind}_before"]) for kind in ("T", "held", "late"))


@pytest.mark.parametrize("error", [SamplerError("nothing can be sampled"), RewardError("it grows without bound")])
def test_a_case_that_cannot_be_judged_is_named_and_left_out(error, main, tmp_path):
    (tmp_path / "a.py").write_text(CODE)

    def judged(theta):
        if theta["least"] == 10:
            raise error
        return result_of([0.5] * 6)
    out, err = main(str(tmp_path / "a.py"), "--wrong", judged=judged)
    assert err[0] == f"{tmp_path}/a.py, least x 10: {error}" and err[1].startswith("mean of 4: ") and len(out) == 5

    def never(theta):
        raise error
    with pytest.raises(SystemExit, match="no update of θ could be judged"):
        main(str(tmp_path / "a.py"), judged=never)


def test_what_is_no_run_or_no_reward_is_said_in_one_line(main, tmp_path):
    def judged(theta):
        return result_of([0.5] * 6)

    def refused(words, *flags, **kwargs):
        with pytest.raises(SystemExit, match=words) as stop:
            main(*flags, judged=judged, **kwargs)
        assert "\n" not in str(stop.value)
    (tmp_path / "bad.py").write_text("def r(wind): return {'a': wind}")
    refused("bad.py holds no reward for touch: .*wind", str(tmp_path / "bad.py"))
    refused("none.py holds no reward for touch: .*No such file", str(tmp_path / "none.py"))
    refused("nowhere holds no finished run: .*No such file", folder=tmp_path / "nowhere")
    for settings in ("{", "{}", "[]", '{"task": "fly"}', '{"task": ["touch"]}'):
        (tmp_path / "settings.json").write_text(settings)
        refused(f"{tmp_path} holds no finished run: ")
    (tmp_path / "settings.json").write_text('{"task": "touch"}')
    np.savez_compressed(tmp_path / "episodes.npz", *[np.zeros((2, len(NAMES)), np.float32)] * 3)
    whole = (tmp_path / "episodes.npz").read_bytes()
    for damaged in (b"PK", whole[:200], whole[:80] + b"x" * 20 + whole[100:]):
        (tmp_path / "episodes.npz").write_bytes(damaged)
        refused(f"{tmp_path} holds no finished run: ")
    np.savez_compressed(tmp_path / "episodes.npz", *[np.zeros((2, len(NAMES)), np.float32)] * 199)
    refused(f"{tmp_path} has 199 episodes, and one update of θ takes 200: name a run of 10,000 steps or more")
