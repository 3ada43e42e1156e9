"""The whole loop at small size, and what a run leaves behind."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import questions
import selfalign
from envs import TASKS, Feature, PandaEnv, Space, Task
from llm import LLM, Reply, read_code
from mh import Posterior, preference_loss, sample_posterior
from reward import Reward, RTheta
from run import Run
from standin import StandIn

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch, tmp_path):
    """small(*flags): a run of 700 steps with two updates of θ; returns its folder."""
    monkeypatch.setattr(selfalign, "UPDATE_EVERY", 300)
    monkeypatch.setattr(selfalign, "RESET_EVERY", 300)
    monkeypatch.setattr(selfalign, "EVAL_EVERY", 200)
    monkeypatch.setattr(selfalign, "EVAL_EPISODES", 2)
    monkeypatch.setattr(selfalign, "EXPLORE_STEPS", 100)
    monkeypatch.setattr(selfalign, "RANKED", 4)
    monkeypatch.setattr(selfalign, "BATCH", {"state": 16, "pixels": 8})
    monkeypatch.setattr(selfalign, "AGENT", {"state": dict(hidden_dim=16, lr=1e-3, std=(1.0, 0.5, 500)),
                                             "pixels": dict(hidden_dim=16, std=(1.0, 0.5, 500))})
    monkeypatch.setattr(selfalign, "sample_posterior", partial(sample_posterior, steps=(50,)))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags, steps=700):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        monkeypatch.setattr(sys, "argv", ["selfalign.py", "--steps", str(steps), "--out", str(folder), *flags])
        selfalign.main()
        return folder
    return run


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", list(TASKS))
def test_loop_end_to_end_and_what_it_leaves(task, small, capsys):
    folder = small("--task", task)
    screen = capsys.readouterr().out
    for words in ("NOT a language model", "def reward(", "steps/s", "Not learnt", f"Watch it:  python selfalign.py --play {folder}"):
        assert words in screen
    assert [int(row["step"]) for row in rows(folder / "metrics.csv")] == [200, 400, 600]
    assert json.loads((folder / "settings.json").read_text())["task"] == task
    kinds = [json.loads(line)["kind"] for line in (folder / "llm.jsonl").read_text().splitlines()]
    assert kinds[0] == "propose" and kinds.count("rank") <= 2           # none while the skill is being learnt
    theta = rows(folder / "theta.csv")
    steps = sorted({int(row["step"]) for row in theta})
    assert steps[0] == 0 and set(steps) <= {0, 300, 600}
    with np.load(folder / "episodes.npz") as episodes:
        assert len(episodes.files) == 14 and episodes["arr_13"].shape == (50, len(TASKS[task].features))
    # The reward's file works anywhere numpy is, with the last θ as its defaults.
    namespace = {}
    exec((folder / "reward.py").read_text(), namespace)
    reward = Reward((folder / "reward.py").read_text().split("\n\n\n", 1)[1], TASKS[task].features)
    last = {row["name"]: row["value"] for row in theta if int(row["step"]) == steps[-1]}
    assert {name: f"{value:.6g}" for name, value in reward.params.items()} == last
    terms = namespace["reward"](**{name: np.array([0.1, 0.2]) for name in reward.features})
    np.testing.assert_array_equal(sum(terms.values()), reward.total({n: np.array([0.1, 0.2]) for n in reward.features}))
    state = torch.load(folder / "policy.pt", weights_only=True)
    assert {name.partition(".")[0] for name in state} == {"1"}          # an actor's weights; states need no encoder


def test_same_seed_twice_gives_identical_metrics_and_another_seed_does_not(small):
    first, second, other = small("--seed", "3"), small("--seed", "3"), small("--seed", "4")
    for name in ("metrics.csv", "theta.csv", "reward.py"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "metrics.csv").read_bytes() != (other / "metrics.csv").read_bytes()


def test_replay_repeats_a_run_byte_for_byte(small, capsys):
    first = small("--task", "push")
    again = small("--task", "push", "--llm", f"replay:{first}/llm.jsonl")
    assert (first / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()
    assert (first / "theta.csv").read_bytes() == (again / "theta.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="no longer follows"):
        small("--task", "grasp", "--llm", f"replay:{first}/llm.jsonl")
    with pytest.raises(SystemExit, match="no longer follows .* exchange 2.*settings, the machine and the libraries"):
        small("--task", "push", "--seed", "2", "--llm", f"replay:{first}/llm.jsonl")      # other questions from the first ranking on


@pytest.mark.parametrize("reward", ["fixed", "sparse"])
def test_baselines_never_change_the_reward(reward, small):
    folder = small("--reward", reward)
    exchanges = (folder / "llm.jsonl").read_text().splitlines()
    assert len(exchanges) == (1 if reward == "fixed" else 0)
    assert {row["step"] for row in rows(folder / "theta.csv")} <= {"0"}
    assert (folder / "reward.py").exists() == (reward == "fixed")


def test_pixels_run_and_stay_finite(small, monkeypatch):
    buffers, real = [], selfalign.ReplayBuffer.__init__
    monkeypatch.setattr(selfalign.ReplayBuffer, "__init__", lambda self, *a, **k: (real(self, *a, **k), buffers.append(self))[0])
    folder = small("--obs", "pixels", steps=300)
    assert buffers[0].obs.shape[1:] == (3, 84, 84)                   # each frame is kept once
    for row in rows(folder / "metrics.csv"):
        assert all(np.isfinite(float(value)) and abs(float(value)) < 1e3 for name, value in row.items() if name != "step")


def offline_reward(task):
    return Reward(read_code((ROOT / "prompts" / "offline" / f"{task}.txt").read_text()), TASKS[task].features)


def tried(task):
    """Features of random actions, (N, F)."""
    return selfalign.random_features(PandaEnv(task), TASKS[task])


def touches(count, force=0.1, first=0):
    """Trajectories of touch: number i keeps contact of `force` N for i steps, near the block all the time."""
    names = list(TASKS["touch"].features)
    taus = [np.zeros((50, len(names))) for _ in range(count)]
    for i, tau in enumerate(taus):
        tau[:, names.index("hand_to_block")] = 0.04
        tau[:first + i, names.index("contact_force")] = force
    return taus


@pytest.fixture
def update(monkeypatch):
    """update(groups, ...): one update of touch's θ after that ranking of `touches`; returns (change, what was called)."""
    def run(groups, mean=None, mixed=True, age=None, changes=None, analysis=("why", {"contact_weight": 9.0}), D=None,
            step=10_000, real_sampler=None, successes=[0.2], rewritten=None):
        reward, called = offline_reward("touch"), []
        changes = changes or [selfalign.Change(0, "proposal", reward.params, reward.params)]
        taus = touches(sum(map(len, groups)))
        history = selfalign.History(changes, [] if D is None else D, [(1000 * i, success) for i, success in enumerate(successes)])
        history.D.append((taus, selfalign.pairs_of(groups)))

        def sample_theta(reward, prior, D, rng):
            called.append(("sample", dict(prior), [pairs.tolist() for _, pairs in D]))
            values = np.array(list((mean or reward.params).values()))
            rhat = np.full(len(values), 1.0 if mixed else 2.0)
            return Posterior(np.ones((2, 4, len(values))) * values, values, 0.3, rhat, np.full(len(values), 1e4))

        def analyse(llm, task, reward, T, wrong, stalled, changes, evaluations):
            called.append(("analyse", stalled, wrong))
            if isinstance(analysis, Exception):
                raise analysis
            return analysis

        def rewrite_reward(llm, task, reward, T, ranking, wrong, changes, evaluations):
            called.append(("rewrite", ranking, wrong, changes, evaluations))
            if isinstance(rewritten, Exception):
                raise rewritten
            return rewritten
        monkeypatch.setattr(selfalign, "rewrite_reward", rewrite_reward)
        monkeypatch.setattr(selfalign, "sample_theta", real_sampler or sample_theta)
        monkeypatch.setattr(selfalign, "analyse_failure", analyse)
        age = np.full(len(taus), 0.5) if age is None else age
        change = selfalign.new_theta(None, TASKS["touch"], reward, history, groups, age, step, np.random.default_rng(0),
                                     rewrite=rewritten is not None)
        return change, called
    return run


LONGEST_FIRST = [[5], [4], [3], [2], [1], [0]]


def test_disagreement_takes_the_posteriors_mean(update):
    # With 1 N as the threshold none of the touches counts: every pair is left open.
    mean = {**offline_reward("touch").params, "contact_threshold": 0.05}
    D = []
    change, called = update(LONGEST_FIRST, mean, D=D)
    assert (change.step, change.cause, change.theta) == (10_000, "posterior", mean)
    assert change.prior == offline_reward("touch").params               # the prior stays where it was
    assert [name for name, *_ in called] == ["sample"] and len(D) == 1
    assert sorted(map(tuple, D[0][1].tolist())) == [(i, j) for i in range(6) for j in range(i)]
    change, called = update(LONGEST_FIRST, mean, D=D)                    # D keeps every round
    assert len(called[0][2]) == 2


def test_where_nothing_succeeds_and_nothing_gets_better_both_are_asked(update):
    mean = {**offline_reward("touch").params, "contact_threshold": 0.05}
    change, called = update(LONGEST_FIRST, mean, successes=[0.0])
    assert [name for name, *_ in called] == ["sample", "analyse"] and change.cause == "analysis"
    assert change.theta == {**mean, "contact_weight": 9.0} and change.posterior is None          # whose interval is not its own
    assert called[1] == ("analyse", True, 0.0)                           # the new θ, which is what it is shown, orders all pairs rightly
    assert change.prior == {**offline_reward("touch").params, "contact_weight": 9.0}
    change, called = update(LONGEST_FIRST, mean, successes=[0.0], analysis=("nothing", {}))
    assert change.cause == "posterior" and change.theta == mean
    better = np.array([0.6, 0.5, 0.4, 0.3, 0.1, 0.0])
    change, called = update(LONGEST_FIRST, mean, successes=[0.05], age=better)           # both are bad, but it gets better
    assert [name for name, *_ in called] == ["sample"] and change.cause == "posterior"
    change, called = update(LONGEST_FIRST, mean, successes=[0.0], age=better)            # nothing at all has succeeded
    assert [name for name, *_ in called] == ["sample", "analyse"] and change.cause == "analysis" and not called[1][1]


def test_an_analysis_that_leads_back_to_a_former_theta_is_said_to_change_nothing(update, capsys):
    first, other = agreeing()[0], {**agreeing()[0].theta, "contact_weight": 9.0}
    changes = [first, selfalign.Change(10_000, "analysis", other, other), first._replace(step=20_000, cause="undone")]
    assert update(LONGEST_FIRST, changes=changes, step=30_000)[0] is None                # contact_weight 9 again
    assert capsys.readouterr().out.count("The run has had that θ: it changes nothing.") == 1
    assert update(LONGEST_FIRST, changes=[first], analysis=("nothing", {}))[0] is None
    assert "has had" not in capsys.readouterr().out


@pytest.mark.parametrize("names", [("t", "episode", "action"), ("episode", "t"), ("episode", "t", "wind")])
def test_features_in_another_order_than_the_tasks_are_refused(names):
    class Other(Line):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, {**info, "features": dict.fromkeys(names, 0.0)}
    with pytest.raises(ValueError, match=f"features are {', '.join(names)}, those of the task line episode, t, action"):
        selfalign.random_features(Other(), LINE)


@pytest.mark.parametrize("mixed, threshold", [(False, 0.05), (True, 2.0)])
def test_a_posterior_that_has_not_mixed_or_is_no_better_is_not_taken(update, mixed, threshold):
    mean = {**offline_reward("touch").params, "contact_threshold": threshold}
    change, called = update(LONGEST_FIRST, mean, mixed)
    assert [name for name, *_ in called] == ["sample", "analyse"] and change.cause == "analysis"
    assert change.theta == change.prior == {**offline_reward("touch").params, "contact_weight": 9.0}
    change, called = update(LONGEST_FIRST, mean, mixed, analysis=("nothing", {}))
    assert change is None


def agreeing(reward="touch"):
    return [selfalign.Change(0, "proposal", *2 * [{**offline_reward(reward).params, "contact_threshold": 0.05}])]


def test_agreement_with_tolerance_asks_what_blocks(update):
    change, called = update(LONGEST_FIRST, changes=agreeing())
    assert [name for name, *_ in called] == ["analyse"] and change.cause == "analysis"
    assert change.theta["contact_weight"] == change.prior["contact_weight"] == 9.0
    change, called = update([[5], [4], [3], [2], [0], [1]], changes=agreeing())         # 1 pair of 15 opposed: noise
    assert [name for name, *_ in called] == ["analyse"]
    change, called = update([[5], [3], [4], [2], [0], [1]], changes=agreeing())         # 2 of 15: not noise
    assert called[0][0] == "sample"
    change, called = update([[0, 1, 2, 3, 4, 5]])                                       # all equal is agreement
    assert [name for name, *_ in called] == ["analyse"]


def test_nothing_is_asked_while_the_robot_gets_better(update):
    newest_best = np.array([0.6, 0.5, 0.4, 0.3, 0.1, 0.0])
    change, called = update(LONGEST_FIRST, age=newest_best, changes=agreeing())
    assert change is None and not called
    change, called = update(LONGEST_FIRST, age=newest_best[::-1], changes=agreeing())
    assert [name for name, *_ in called] == ["analyse"]


def test_the_newest_quarter_of_a_period_is_compared_with_the_half_before_it(update):
    for ages, asked in (([0.5, 0.5, 0.5, 0.0, 0.24, 0.24][::-1], 0), ([0.5, 0.5, 0.5, 0.26, 0.26, 0.26][::-1], 1),      # none is new
                        ([0.26, 0.7, 0.74, 0.0, 0.1, 0.2], 0), ([0.76, 0.8, 0.9, 0.0, 0.1, 0.2], 1)):         # none to compare with
        change, called = update(LONGEST_FIRST, age=np.array(ages if ages[0] != 0.24 else ages[::-1]), changes=agreeing())
        assert [name for name, *_ in called] == ["analyse"] * asked, ages


@pytest.mark.parametrize("mean_success, both", [(0.0, True), (0.1, True), (0.101, False), (0.5, False)])
def test_a_tenth_of_success_is_hardly_any(update, mean_success, both):
    mean = {**offline_reward("touch").params, "contact_threshold": 0.05}
    called = update(LONGEST_FIRST, mean, successes=[1.0] * 5 + [mean_success] * 10)[1]        # earlier periods do not count
    assert [name for name, *_ in called] == ["sample", "analyse"][:1 + both]


@pytest.mark.parametrize("beaten, called", [(5, True), (6, True), (7, False), (10, False)])
def test_the_robot_gets_better_if_its_newest_attempt_beats_more_than_six_of_ten(beaten, called, update):
    order = list(range(11))[::-1]                                     # as the reward has it: the rankings agree
    age = np.full(11, 0.5)
    age[order[10 - beaten]] = 0.0                                     # the newest
    assert [asked[:2] for asked in update([[i] for i in order], changes=agreeing(), age=age)[1]] == [("analyse", True)] * called


def test_a_change_after_which_the_robot_is_worse_is_undone(update):
    first = agreeing()[0]
    worse = {**first.theta, "contact_weight": 9.0}
    changes = [first, selfalign.Change(10_000, "analysis", worse, worse)]
    earlier_best, same = np.array([0.0, 0.1, 0.24, 1.0, 1.1, 1.99]), np.full(6, 0.5)
    change, called = update(LONGEST_FIRST, age=earlier_best, changes=changes, step=20_000)
    assert (change.step, change.cause, change.theta, change.prior) == (20_000, "undone", first.theta, first.prior) and not called
    change, called = update(LONGEST_FIRST, age=earlier_best[::-1], changes=changes, step=20_000)      # better now: kept
    assert change is None
    change, called = update(LONGEST_FIRST, age=earlier_best, changes=changes, step=30_000)   # not the last period's change
    assert change is None or change.cause != "undone"
    changes.append(selfalign.Change(20_000, "undone", first.theta, first.prior))
    change, called = update(LONGEST_FIRST, age=earlier_best, changes=changes, step=30_000)   # an undoing is not undone
    assert change is None and [asked[:2] for asked in called] == [("analyse", True)]                    # nor is what was undone taken again
    change, called = update(LONGEST_FIRST, age=same, changes=changes, step=40_000, analysis=("other", {"reach_weight": 2.0}))
    assert change.cause == "analysis" and change.theta == {**first.theta, "reach_weight": 2.0}


def test_where_the_reward_is_rewritten_nobody_samples_or_analyses(update):
    better = Reward("def r(contact_force, scale=0.5):\n    return {'press': contact_force / scale}", TASKS["touch"].features)
    change, called = update(LONGEST_FIRST, rewritten=better, successes=[0.2, 0.1])
    assert (change.step, change.cause, change.theta, change.source) == (10_000, "rewrite", {"scale": 0.5}, better.source)
    # By a threshold of 1 N all attempts are alike: each pair counts half.
    (name, ranking, wrong, changes, evaluations), = called
    assert (name, ranking, wrong, evaluations) == ("rewrite", LONGEST_FIRST, 0.5, [(0, 0.2), (1000, 0.1)])
    assert [change.theta for change in changes] == [offline_reward("touch").params]
    assert update(LONGEST_FIRST, rewritten=selfalign.LLMError("it is down"))[0] is None
    # Where the rankings agree: asked only if the robot gets no better, or never succeeds.
    improving = np.array([0.6, 0.5, 0.4, 0.3, 0.1, 0.0])
    for age, successes, asked in ((improving, [0.2], 0), (improving, [0.0], 1), (np.full(6, 0.5), [0.2], 1)):
        change, called = update(LONGEST_FIRST, rewritten=better, changes=agreeing(), age=age, successes=successes)
        assert len(called) == asked and (change is not None) == asked


def test_a_reward_that_the_run_has_had_is_no_new_one(update):
    first = offline_reward("touch")
    again = Reward(first.source.replace("contact_weight=2.0", "contact_weight=2"), TASKS["touch"].features)
    changes = [selfalign.Change(0, "proposal", first.params, first.params, source=first.source)]
    assert again.source != first.source and update(LONGEST_FIRST, rewritten=again, changes=changes)[0] is None
    other = Reward(first.source.replace("contact_weight=2.0", "contact_weight=3.0"), TASKS["touch"].features)
    assert update(LONGEST_FIRST, rewritten=other, changes=changes)[0].theta["contact_weight"] == 3.0


def test_an_undone_rewriting_brings_the_code_before_it_back(update):
    first = agreeing()[0]._replace(source="the code")
    other = {**first.theta, "contact_weight": 9.0}
    changes = [first, selfalign.Change(10_000, "rewrite", other, other, source="other code")]
    earlier_best, better = np.array([0.0, 0.1, 0.24, 1.0, 1.1, 1.99]), offline_reward("push")
    change, called = update(LONGEST_FIRST, age=earlier_best, changes=changes, step=20_000, rewritten=better)
    assert (change.cause, change.theta, change.source) == ("undone", first.theta, "the code") and not called


def test_other_code_keeps_the_level_of_rewards_as_well():
    names = list(TASKS["touch"].features)
    features = np.random.default_rng(0).uniform(0, 0.1, (500, len(names)))
    r_theta, first = RTheta(offline_reward("touch"), features), offline_reward("touch")
    before = r_theta(features)
    source = "def r(hand_to_block, contact_force, far=3.0):\n    return {'far': 9.0 - far * hand_to_block, 'press': contact_force}\n"
    r_theta.change({"far": 4.0}, [features[:300], features[300:]], source)
    after = r_theta(features)
    assert r_theta.reward.source == source and r_theta.theta == {"far": 4.0}
    assert (after.mean(), after.std()) == pytest.approx((before.mean(), before.std()))
    expected = -4.0 * features[:, names.index("hand_to_block")] + features[:, names.index("contact_force")]
    assert np.corrcoef(after, expected)[0, 1] == pytest.approx(1.0)
    r_theta.change(first.params, [features], first.source)
    np.testing.assert_allclose(r_theta(features), before)


def test_who_rewrites_a_reward_sees_its_code_and_attempts_in_the_order_of_the_ranking():
    asked, names, taus = [], list(TASKS["touch"].features), touches(30, force=1.0)
    reward = Reward("def r(contact_force, w=1.0, v=2.0):\n    return {'touch': w * contact_force, 'none': -v * contact_force}", names)
    answers = iter(["def r(contact_force, w=1.0):\n    return {'a': w / (contact_force - 1.0)}",          # not finite on the attempts
                    "Better so:\n```python\ndef r(contact_force, u=3.0):\n    return {'touch': u * contact_force}\n```"])

    def backend(messages):
        asked.append(messages[-1]["content"])
        return Reply(next(answers))
    ranking = [[29 - i] for i in range(28)] + [[0, 1]]
    theta = {"w": 0.5, "v": 0.25}
    changes = [selfalign.Change(0, "proposal", theta, theta, source=reward.source),
               selfalign.Change(10_000, "rewrite", {}, {}, source="def worse(x): ..."),
               selfalign.Change(20_000, "undone", theta, theta, source=reward.source)]
    better = questions.rewrite_reward(LLM(backend, lambda exchange: None), TASKS["touch"], reward, taus, ranking, 0.375,
                                      changes, [(2000, 0.0), (3000, 0.35)])
    assert better.params == {"u": 3.0} and "finite" in asked[1]
    for words in ("w=0.5, v=0.25", "2,000: 0%, 3,000: 35%", "30 of the robot's attempts were ranked", "orders 38% wrongly",
                  "tried before and taken back, because the robot did worse with it than with the one before it:\n\n```python\ndef worse(x): ...\n```\n\nSuccess", "are 12 of them", "discount of 0.97",
                  TASKS["touch"].goal, "reward per step 0.145 = 0.29 (touch) + -0.145 (none)", questions.rules(tuned=False)):
        assert words in asked[0], words
    assert "$" not in asked[0]
    paid = [float(value) for value in re.findall(r"reward per step ([\d.e-]+) =", asked[0])]
    assert len(paid) == questions.ANALYSED and paid == sorted(paid, reverse=True) and paid[0] == pytest.approx(0.145)
    assert "estimated from few data" in questions.rules() and "estimated" not in asked[0]


def test_a_sampler_that_fails_costs_neither_the_ranking_nor_the_analysis(update, monkeypatch):
    D = []

    def fails(*args, **kwargs):
        raise selfalign.SamplerError("nothing found")
    monkeypatch.setattr(selfalign, "sample_posterior", fails)
    real = selfalign.sample_theta
    change, called = update(LONGEST_FIRST, D=D, real_sampler=real)
    assert change.cause == "analysis" and len(D) == 1


def test_an_llm_that_fails_in_the_analysis_costs_neither_the_ranking_nor_the_posterior(update):
    mean, D = {**offline_reward("touch").params, "contact_threshold": 0.05}, []
    change, called = update(LONGEST_FIRST, mean, successes=[0.0], analysis=selfalign.LLMError("it is down"), D=D)
    assert [name for name, *_ in called] == ["sample", "analyse"] and change.cause == "posterior" and len(D) == 1
    change, called = update(LONGEST_FIRST, changes=agreeing(), analysis=selfalign.LLMError("it is down"), D=D)
    assert change is None and len(D) == 2


def test_between_two_modes_the_estimate_is_the_mean_of_the_draws_that_explain_most():
    reward = Reward("def r(x, a=10.0):\n    return {'t': np.where(np.abs(x - a) < 0.5, 1.0, 0.0)}", ["x"])
    D = [([np.ones((5, 1)), np.full((5, 1), 7.0)], np.array([[0, 1]]))]               # near 1 is better than near 7
    now = selfalign.Change(0, "proposal", dict(reward.params), dict(reward.params))

    def estimated(*values):
        samples = np.array(values * 4)[None, :, None]
        mean = np.exp(np.log(samples).mean(axis=(0, 1)))
        theta, gain = selfalign.estimate(Posterior(samples, mean, 0.3, np.ones(1), np.full(1, 300.0)), reward, now, D)
        return theta["a"], gain, mean[0]
    a, gain, mean = estimated(0.8, 1.25, *8 * [4.0])                  # two draws in ten explain D, their mean in log θ as well
    assert (a, gain) == (pytest.approx(1.0), 0.5) and mean > 1.5
    a, gain, mean = estimated(0.7, 0.7, 0.7, 1.2)                     # the mean of all does: it is taken
    assert (a, gain) == (pytest.approx(mean), 0.5)
    a, gain, mean = estimated(4.0, 4.2)                               # nothing does
    assert (a, gain) == (pytest.approx(mean), 0.0)


def test_a_skill_that_is_being_learnt_is_left_alone():
    def learning(*rates):
        return selfalign.being_learnt([rate / 100 for rate in rates])
    assert not learning(*[0] * 9) and not learning(0)
    assert learning(*[95] * 19) and learning(*[100] * 10, 65, 65, 70)       # it mostly succeeds
    assert not learning(*[100] * 10, 65, 65, 65)
    assert learning(*[0] * 6, 5, 15, 65) and learning(*[0] * 6, 25, 25, 30)    # on its way
    assert not learning(*[0] * 6, 25, 25, 25) and not learning(*[0] * 6, 20, 0, 35)     # or by chance
    assert not learning(*[0] * 5, 40, 20, 50, 50) and learning(*[0] * 5, 35, 20, 50, 50)       # 40 % is no more than ever before
    assert not learning(*[0] * 8, 60, *[50] * 10) and not learning(*[0] * 8, 60, *[90] * 7, *[50] * 3)


def test_pairs_follow_the_ranking():
    assert sorted(map(tuple, selfalign.pairs_of([[2], [0, 3], [1]]).tolist())) == [(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]
    assert selfalign.pairs_of([[0, 1]]).shape == (0, 2)
    pairs = np.array([(2, 0), (0, 1), (3, 1), (3, 0)])
    np.testing.assert_array_equal(selfalign.discordant(np.array([1.0, 2.0, 5.0, 1.0]), pairs), [0, 1, 1, 0.5])


def test_preferred_is_the_share_of_better_places():
    place = np.array([0, 1, 1, 2])
    old = np.array([True, True, False, False])
    assert selfalign.preferred(place, old, ~old) == (1 + 1 + 0.5 + 1) / 4
    assert selfalign.preferred(place, ~old, old) == (0 + 0 + 0.5 + 0) / 4
    assert selfalign.preferred(place, old, np.zeros(4, bool)) == 0.5


def test_trajectories_are_the_newest_the_earlier_and_a_spread_in_random_order():
    # 450 episodes of 200 a period, whose return is a known function of their index.
    names = list(TASKS["touch"].features)
    reward = Reward("def r(contact_force, w=1.0):\n    return {'a': w * contact_force}", names)
    value = np.random.default_rng(1).permutation(450).astype(float)
    episodes = [np.full((2, len(names)), v) for v in value]
    r_theta = RTheta(reward, episodes[0])
    T, age, chosen = selfalign.choose_trajectories(episodes, r_theta, 50, np.random.default_rng(0))
    assert len(T) == selfalign.RANKED == 48 == len(set(chosen)) and chosen.min() >= 200
    for tau, index in zip(T, chosen):
        assert (tau == value[index]).all()
    np.testing.assert_allclose(age, (449 - chosen) / 200)
    assert (age < 0.25).sum() >= 12 and ((1 <= age) & (age < 1.25)).sum() == 12 and (age >= 1.25).sum() == 0
    spread = np.sort(value[chosen[age < 1]])
    assert spread[0] == value[np.setdiff1d(np.arange(250, 450), chosen[age < 0.25])].min()
    assert abs(np.corrcoef(chosen, np.arange(48))[0, 1]) < 0.5                           # shuffled
    again = selfalign.choose_trajectories(episodes, r_theta, 50, np.random.default_rng(0))[2]
    other = selfalign.choose_trajectories(episodes, r_theta, 50, np.random.default_rng(1))[2]
    assert (again == chosen).all() and (other != chosen).any()
    first = selfalign.choose_trajectories(episodes[:200], r_theta, 50, np.random.default_rng(0))[1]
    assert len(first) == 48 and (first < 1).all()


def test_theta_changes_relabel_the_buffer_and_keep_the_level_of_rewards(small, monkeypatch):
    buffers, chosen = [], iter([0.3, 0.02])
    real = selfalign.ReplayBuffer.relabel

    def relabel(buffer, reward_fn):
        real(buffer, reward_fn)
        rows = np.flatnonzero(buffer.acted)
        buffers.append((buffer.reward[rows].copy(), buffer.features[rows].copy()))

    def new_theta(llm, task, reward, history, ranking, age, step, rng, rewrite):
        theta = {**history.changes[-1].theta, "contact_threshold": next(chosen), "reach_weight": 7.0}
        return selfalign.Change(step, "posterior", theta, theta)
    monkeypatch.setattr(selfalign.ReplayBuffer, "relabel", relabel)
    monkeypatch.setattr(selfalign, "new_theta", new_theta)
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (0.0, 0.0, 0.0))
    folder = small()
    # Every stored reward is that of the new θ, shifted and scaled so that over the last half period the mean and the
    # spread stay what they were; at first random behaviour earns 0.
    names, reward = list(TASKS["touch"].features), offline_reward("touch")
    mean, spread = -reward.total(reward.named(selfalign.random_features(PandaEnv("touch"), TASKS["touch"]))).mean(), 1.0
    thetas = [{row["name"]: float(row["value"]) for row in rows(folder / "theta.csv") if row["step"] == step}
              for step in ("0", "300", "600")]
    assert [theta["contact_threshold"] for theta in thetas] == [1, 0.3, 0.02] and len(buffers) == 2
    for before, after, (stored, features) in zip(thetas, thetas[1:], buffers):
        new, last = reward.total(dict(zip(names, features.T)), after), slice(-150, None)
        was = mean + spread * reward.total(dict(zip(names, features[last].T)), before)
        assert stored[last].mean() == pytest.approx(was.mean(), abs=1e-3)
        assert stored[last].std() == pytest.approx(was.std(), rel=1e-3)
        spread, mean = np.polyfit(new, stored, 1)
        assert spread > 0
        np.testing.assert_allclose(stored, mean + spread * new, rtol=1e-3, atol=1e-3)


class Line:
    """An environment of its own: features are (episode, step, action), the observation is where training or evaluation is."""

    action_space, observation_space = Space(-1.0, 1.0, (1,), np.float32), Space(0.0, 99.0, (3,), np.float32)
    made = []

    def __init__(self):
        self.episode, self.number = -1, len(Line.made)
        Line.made.append(self)

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.number, self.episode, self.t], np.float32)

    def step(self, action):
        self.t += 1
        features = {"episode": float(self.episode), "t": float(self.t), "action": float(action[0])}
        return self._obs(), 0.5, False, self.t == 10, {"features": features, "success": False}


LINE = Task("line", "Go on.", {name: Feature("", 0, 100, name) for name in ("episode", "t", "action")}, success=(("t", ">", 99),),
            steps=1, robot="a dot", dt=1.0, horizon=10)


def test_every_line_of_the_algorithm_gets_what_it_should(small, monkeypatch, tmp_path):
    log, batches, noted, fresh = [], [], [], []
    Line.made.clear()

    class Agent:
        std, greedy = (1.0, 0.1, 500), torch.nn.Identity()

        def __init__(self, obs_shape, action_shape, device, **settings):
            assert (obs_shape, action_shape, device) == ((3,), (1,), "cpu")

        def act(self, obs, step, explore=True):
            log.append(("act" if explore else "evaluate", *obs.astype(int).tolist(), step))
            return np.array([0.25], np.float32)

        def update(self, batch, step):
            batches.append((batch, step))
            return {"critic_loss": 0.0, "actor_loss": 0.0, "q": 0.0}

        def state_dict(self):
            return {}

        def reset(self):
            fresh.append(len(batches))

    def rank_attempts(llm, task, T):
        noted.append(("rank", [tau.copy() for tau in T]))
        return [[2], [0, 1], [3]]

    def new_theta(llm, task, reward, history, ranking, age, step, rng, rewrite):
        noted.append(("new_theta", step, history.D[-1], ranking, age, list(history.evaluations)))
        return selfalign.Change(step, "posterior", {"w": 3.0}, {"w": 2.0}) if step == 300 else None
    monkeypatch.setattr(selfalign, "DrQV2", Agent)
    monkeypatch.setattr(selfalign, "rank_attempts", rank_attempts)
    monkeypatch.setattr(selfalign, "new_theta", new_theta)
    (tmp_path / "r.py").write_text("def r(t, action, w=2.0):\n    return {'a': w * t + action}\n")
    run = Run(tmp_path / "line", {"steps": 700})
    llm = LLM(StandIn(), run.exchange)
    assert selfalign.train(Line, LINE, llm, run, steps=700, proposal=str(tmp_path / "r.py")) is None
    env, eval_env = Line.made

    # Random actions for 100 steps, then the agent's, each for the observation that the training environment showed last.
    acts = [entry[1:] for entry in log if entry[0] == "act"]
    assert [(e, t) for _, e, t, _ in acts] == [(n // 10, n % 10) for n in range(100, 700)]
    assert {number for number, *_ in acts} == {env.number}
    features = np.concatenate(run.state.buffer.episodes())
    np.testing.assert_array_equal(features[:, :2], [(n // 10, n % 10 + 1) for n in range(700)])
    assert (features[100:, 2] == 0.25).all() and features[:100, 2].std() > 0.4

    # At 300 nothing has ever succeeded: the networks start again, exploration from the middle of its 500 steps, and so at 600.
    assert fresh == [100, 250]
    assert [step for *_, step in acts] == [*range(101, 301), *range(251, 551), *range(251, 351)]
    # One update every second step, with the same step, from batches of observation, action, reward, discount and what came next.
    assert [step for _, step in batches] == [*range(102, 301, 2), *range(252, 551, 2), *range(252, 351, 2)]
    tried = selfalign.random_features(Line(), LINE)
    centre = (2.0 * tried[:, 1] + tried[:, 2]).mean()
    for number, ((obs, action, reward, discount, next_obs), _) in enumerate(batches):
        assert obs.shape == next_obs.shape == (16, 3) and action.shape == (16, 1)
        newest = 102 + 2 * number
        assert (obs[:, 1] * 10 + obs[:, 2]).max() < newest
        if newest <= 300:                                            # three steps of r_θ, fewer at the end of an episode
            for (_, e, t), a, r, d, (_, e2, t2) in zip(obs, action, reward, discount, next_obs):
                m = int(t2 - t)
                assert e2 == e and m == min(3, 10 - t) and d == pytest.approx(LINE.discount ** m)
                acted = features[int(e * 10 + t):][:m]
                assert a == pytest.approx(acted[0, 2])
                assert r == pytest.approx(sum(LINE.discount ** k * (2 * f[1] + f[2] - centre) for k, f in enumerate(acted)), abs=1e-4)

    # Evaluations every 200 steps, in an environment of their own, without noise; each two episodes of it.
    evaluations = [entry[1:] for entry in log if entry[0] == "evaluate"]
    assert {number for number, *_ in evaluations} == {eval_env.number} and len(evaluations) == 3 * 2 * 10

    # T: four trajectories that were lived, ranked in the order in which D stores them, with their ages in periods of 30 episodes.
    assert [name for name, *_ in noted] == ["rank", "new_theta"] * 2
    for (_, shown), (_, step, (T, pairs), ranking, age, evaluated) in zip(noted[::2], noted[1::2]):
        assert step in (300, 600) and ranking == [[2], [0, 1], [3]] and len(T) == 4
        assert sorted(map(tuple, pairs.tolist())) == [(0, 3), (1, 3), (2, 0), (2, 1), (2, 3)]
        for tau, told, old in zip(T, shown, age):
            np.testing.assert_array_equal(tau, told)
            np.testing.assert_array_equal(tau, features[int(tau[0, 0]) * 10:][:10])
            assert old == pytest.approx((step / 10 - 1 - tau[0, 0]) / 30)
        assert [at for at, _ in evaluated] == [at for at in (200, 400, 600) if at <= step]

    # The buffer's rewards are the new θ's, up to a centre and a scale.
    acted = np.flatnonzero(run.state.buffer.acted)
    stored, lived = run.state.buffer.reward[acted], run.state.buffer.features[acted]
    new = 3 * lived[:, 1] + lived[:, 2]
    scale, centre = np.polyfit(new, stored, 1)
    assert scale > 0
    np.testing.assert_allclose(stored, scale * new + centre, atol=1e-4)
    assert [row["value"] for row in rows(tmp_path / "line" / "theta.csv")] == ["2", "3"]


def test_evaluation_changes_nothing_in_training(small, monkeypatch):
    runs = []
    for every in (100, 300):
        monkeypatch.setattr(selfalign, "EVAL_EVERY", every)
        monkeypatch.setattr(selfalign, "RESET_EVERY", 1_000)                 # exploration does not start again
        folder = small("--reward", "fixed", "--task", "push", steps=600)
        with np.load(folder / "episodes.npz") as episodes:
            runs.append([episodes[name] for name in episodes.files])
    for often, seldom in zip(*runs, strict=True):
        np.testing.assert_array_equal(often, seldom)


@pytest.mark.parametrize("horizon", [50, 250, 500, 1000, 2500])
def test_a_ranking_holds_no_trajectory_twice_and_fewer_where_there_are_fewer(horizon):
    period, reward = 10_000 // horizon, Reward("def r(x, w=1.0):\n    return {'a': w * x}", ["x"])
    r_theta = RTheta(reward, np.zeros((1, 1)))
    for end in (period, 2 * period, 3 * period):
        episodes = [np.full((2, 1), i % 7) for i in range(end)]
        T, age, chosen = selfalign.choose_trajectories(episodes, r_theta, horizon, np.random.default_rng(0))
        assert len(T) == len(age) == len(chosen) == len(set(chosen)) and min(48, 0.7 * period) <= len(T) <= 48
        assert chosen.max() < end and chosen.min() >= max(0, end - 2 * period)
        assert (age < 0.25).any() and (end == period or (age >= 1).any())


def test_episodes_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        selfalign.train(Line, dataclasses.replace(LINE, horizon=2501), None, None)
    with pytest.raises(ValueError, match="first 1000"):
        selfalign.train(Line, dataclasses.replace(LINE, horizon=1001), None, None)

    def made():
        raise NotImplementedError("far enough")
    with pytest.raises(NotImplementedError):
        selfalign.train(made, dataclasses.replace(LINE, horizon=1000), None, None)


def test_a_run_whose_theta_never_changes_is_the_run_of_the_fixed_reward(small, monkeypatch):
    monkeypatch.setattr(selfalign, "new_theta", lambda *args: None)
    assert (small() / "metrics.csv").read_bytes() == (small("--reward", "fixed") / "metrics.csv").read_bytes()


def test_the_critic_sees_rewards_of_which_random_behaviour_earns_none(small, monkeypatch):
    seen = []
    real = selfalign.ReplayBuffer.add
    monkeypatch.setattr(selfalign.ReplayBuffer, "add", lambda buffer, *args: (seen.append(args), real(buffer, *args)))
    proposal = "```python\ndef reward(hand_to_block, w=1.0):\n    return {'near': 100 - w * hand_to_block}\n```"
    monkeypatch.setattr(StandIn, "__call__", lambda self, messages: Reply(proposal))
    small("--reward", "fixed", steps=100)
    usual = (100 - tried("touch")[:, list(TASKS["touch"].features).index("hand_to_block")]).mean()
    for _, _, reward, _, _, features in seen:
        assert reward == pytest.approx(100 - features[0] - usual)
    seen.clear()
    small("--reward", "sparse", steps=100)
    assert {args[2] for args in seen} <= {0.0, 1.0}


def test_learning_and_exploration_begin_again_after_a_period_without_success(small, monkeypatch):
    steps, fresh = [], []
    monkeypatch.setattr(selfalign.DrQV2, "reset", lambda agent, reset=selfalign.DrQV2.reset: (fresh.append(len(steps)), reset(agent)))
    real = selfalign.DrQV2.act
    monkeypatch.setattr(selfalign.DrQV2, "act", lambda agent, obs, step, explore=True: (
        steps.append(step) if explore else None, real(agent, obs, step, explore))[1])
    results = iter([0.0, 0.5, 0.5])
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (next(results), 0.0, 0.0))
    small("--reward", "fixed", steps=700)
    # the schedule lasts 500 steps: at 300, without a success so far, it starts again from its middle; at 600 it goes on
    assert steps == [*range(101, 301), *range(251, 651)] and fresh == [0, 200]
    steps.clear(), fresh.clear()
    results = iter([0.0, 0.0, 0.0])
    monkeypatch.setattr(selfalign, "RESET_EVERY", 600)                 # which need not be how often θ is updated
    small("--reward", "fixed", steps=700)
    assert steps == [*range(101, 601), *range(251, 351)] and fresh == [0, 500]


def test_a_proposal_from_a_file(small, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import numpy as np\n\n\ndef mine(hand_to_block, closeness=3.0):\n    return {'near': -closeness * hand_to_block}\n")
    folder = small("--proposal", str(path))
    assert {row["name"] for row in rows(folder / "theta.csv")} == {"closeness"}
    assert all(json.loads(line)["kind"] != "propose" for line in (folder / "llm.jsonl").read_text().splitlines())
    again = small("--proposal", str(folder / "reward.py"), "--reward", "fixed")          # what a run leaves can be read again
    assert (again / "theta.csv").exists()
    for content, words in ((None, "No such file"), ("I would reward touching", "no function"), ("def r(a, w=1.0):\n    return {}", "a is not")):
        path = tmp_path / "bad.md"
        if content is not None:
            path.write_text(content)
        with pytest.raises(SystemExit, match=f"(?s)--proposal .*{words}"):
            small("--proposal", str(path))


def test_the_analysis_prompt_says_how_theta_came_about():
    asked, reward = [], offline_reward("touch")

    def backend(messages):
        asked.append(messages[0]["content"])
        return Reply('{"blocked_by": "x", "params": {"contact_threshold": 0.2}}')
    changes = [selfalign.Change(0, "proposal", reward.params, reward.params),
               selfalign.Change(10_000, "posterior", {**reward.params, "reach_weight": 0.125}, reward.params)]
    taus = touches(5)
    result = questions.analyse_failure(LLM(backend, lambda exchange: None), TASKS["touch"], reward, taus, 0.375, True, changes,
                                       [(2000, 0.0), (3000, 0.35)])
    assert result == ("x", {"contact_threshold": 0.2})
    for words in ("- 0 steps, proposal: reach_weight=1,", "- 10,000 steps, posterior: reach_weight=0.125,", "2,000: 0%, 3,000: 35%",
                  "reach_weight=0.125", "discount of 0.97", "orders 38% wrongly",
                  "reward per step 0.0838 = 0.0838 (reach) + 0 (slow) + 0 (contact)"):
        assert words in asked[0], words
    assert "$" not in asked[0] and "it does not succeed reliably and has stopped\ngetting better. Attempts" in asked[0]
    questions.analyse_failure(LLM(backend, lambda exchange: None), TASKS["touch"], reward, taus, 0.375, False, changes, [(2000, 0.0)])
    assert "stopped" not in asked[1] and "but it has not succeeded once of late. Attempts" in asked[1]


@pytest.mark.parametrize("task", list(TASKS))
def test_no_placeholder_is_left_in_a_prompt(task):
    asked = []

    def backend(messages):
        asked.append(messages[0]["content"])
        return StandIn()(messages)
    llm, taus = LLM(backend, lambda exchange: None), [np.zeros((50, len(TASKS[task].features)))] * 2
    reward = questions.propose_reward(llm, TASKS[task], tried(task))
    assert questions.rank_attempts(llm, TASKS[task], taus) == [[0, 1]]
    questions.analyse_failure(llm, TASKS[task], reward, taus, 0.0, True, [selfalign.Change(0, "proposal", reward.params, {})], [(2000, 0.0)])
    assert len(asked) == 3
    for text in asked:
        assert "$" not in text and TASKS[task].goal in text
        assert ("limit is broken" in text) == bool(TASKS[task].limits)
    assert ("breaks a limit" in asked[1]) == bool(TASKS[task].limits)


def test_an_analysis_sees_attempts_from_the_best_to_the_worst_reward():
    asked, names = [], list(TASKS["touch"].features)
    reward = Reward("def r(contact_force, w=1.0):\n    return {'touch': w * contact_force}", names)
    taus = touches(30, force=1.0)
    order = np.random.default_rng(0).permutation(30)

    def backend(messages):
        asked.append(messages[0]["content"])
        return Reply('{"blocked_by": "x", "params": {}}')
    questions.analyse_failure(LLM(backend, lambda exchange: None), TASKS["touch"], reward, [taus[i] for i in order], 0.1, True,
                              [selfalign.Change(0, "proposal", reward.params, {})], [(2000, 0.0)])
    paid = [float(value) for value in re.findall(r"reward per step ([\d.e-]+) =", asked[0])]
    assert len(paid) == questions.ANALYSED and paid == sorted(paid, reverse=True)
    assert paid[0] == pytest.approx(29 / 50) and paid[-1] == 0                         # the best and the worst are among them


def test_an_analysis_that_makes_the_reward_infinite_goes_back():
    reward = Reward("def r(contact_force, scale=1.0):\n    return {'a': np.exp(contact_force / scale)}", TASKS["touch"].features)
    answers = iter(['{"params": {"scale": 1e-5}}', '{"params": {"scale": 0.5}}'])
    llm = LLM(lambda messages: Reply(next(answers)), lambda exchange: None)
    taus = touches(3)
    _, params = questions.analyse_failure(llm, TASKS["touch"], reward, taus, 0.0, True,
                                          [selfalign.Change(0, "proposal", reward.params, {})], [(2000, 0.0)])
    assert params == {"scale": 0.5}


def test_rankings_are_of_the_trajectories_that_were_shown():
    # The stand-in reads the prompt: the longest contact is the best, whatever the order in which it is shown.
    taus = touches(6)
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 4, 1, 2]):
        groups = questions.rank_attempts(LLM(StandIn(), lambda exchange: None), TASKS["touch"], [taus[i] for i in order])
        assert [order[i] for group in groups for i in group] == [5, 4, 3, 2, 1, 0]


def test_a_fist_on_the_block_is_no_grip_for_the_stand_in_and_its_reward():
    names, reward = list(TASKS["grasp"].features), offline_reward("grasp")
    grip, fist, idle = (np.tile([{"hand_to_block": distance, "hand_height": 0.03, "gripper_opening": opening,
                                  "grip_force": force}.get(name, 0.0) for name in names], (50, 1))
                        for distance, opening, force in ((0.005, 0.042, 2.0), (0.032, 0.038, 2.0), (0.032, 0.08, 0.0)))
    assert reward.terms(dict(zip(names, fist.T)))["grip"].sum() == 0 < reward.terms(dict(zip(names, grip.T)))["grip"].sum()
    assert questions.rank_attempts(LLM(StandIn(), lambda exchange: None), TASKS["grasp"], [fist, grip, idle]) == [[1], [0, 2]]


def test_stops_at_the_first_of_two_perfect_evaluations_running(small, monkeypatch, capsys):
    results = iter([0.5, 1.0, 0.5, 1.0, 1.0, 0.0])
    monkeypatch.setattr(selfalign, "evaluate", lambda *args: (next(results), 0.0, 0.0))
    folder = small(steps=1200)
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["200", "400", "600", "800", "1000"]
    assert "reached 2 of 2 at 800 environment steps, and again 200 steps later" in capsys.readouterr().out


def test_evaluation_counts_fresh_successful_episodes(monkeypatch):
    class Env:
        """Every second episode succeeds; all of them seem to in the middle."""
        episode = -1

        def reset(self):
            self.episode, self.t = self.episode + 1, 0
            return np.zeros(1), {}

        def step(self, action):
            self.t += 1
            success = self.t == 3 or self.t == 5 and self.episode % 2 == 0
            return np.zeros(1), float(success), False, self.t == 5, {"success": success, "features": {"x": 2.0}}

    class Agent:
        def act(self, obs, step, explore):
            assert not explore
            return np.zeros(4)
    assert selfalign.evaluate(Agent(), Env(), None, 2) == (0.5, 1.5, 1.5)
    r_theta = RTheta(Reward("def r(x, w=3.0):\n    return {'a': w * x}", ["x"]), np.zeros((1, 1)))
    assert selfalign.evaluate(Agent(), Env(), r_theta, 2) == (0.5, 1.5, 30.0)


def trajectories(rng, count=6):
    return [rng.uniform(0, 0.5, (50, len(TASKS["touch"].features))) for _ in range(count)]


def test_align_corrects_the_threshold_that_the_paper_corrects():
    # Preferences for contact as it really is, 0.05 to 0.15 N, against a reward that asks for 1 N.
    rng, names = np.random.default_rng(0), list(TASKS["touch"].features)
    reward = Reward("def r(hand_to_block, contact_force, reach=1.0, contact=2.0, threshold=1.0):\n"
                    "    return {'a': -reach * hand_to_block, 'b': contact * (contact_force > threshold)}", names)
    taus, force = trajectories(rng, 20), names.index("contact_force")
    for i, tau in enumerate(taus):
        tau[:, force] = np.where(np.arange(50) < 2.5 * i, rng.uniform(0.05, 0.15, 50), 0.0)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    D = [(taus[:12], np.array([pair for pair in pairs if max(pair) < 12])),        # two rankings: the second counts from 0 again
         (taus[8:], np.array([(i - 8, j - 8) for i, j in pairs if j >= 8]))]
    posterior = selfalign.sample_theta(reward, reward.params, D, np.random.default_rng(0))
    theta, gain = selfalign.estimate(posterior, reward, selfalign.Change(0, "proposal", reward.params, reward.params), D)
    assert posterior.mixed and theta["threshold"] < 0.15
    before, after = (preference_loss(reward.returns(taus)(params), pairs) for params in (reward.params, theta))
    assert after < 0.5 * before and gain > 0.3                      # of 0.5 from every pair left open to every pair right


def test_a_ranking_of_k_weighs_its_pairs_two_kths(monkeypatch):
    names, seen = list(TASKS["touch"].features), {}
    reward = Reward("def r(contact_force, w=1.0):\n    return {'a': w * contact_force}", names)
    monkeypatch.setattr(selfalign, "sample_posterior", lambda ll, centre, rng: seen.update(ll=ll, centre=centre))
    a, b = touches(4), touches(3, force=0.3)
    D = [(a, np.array([(3, 0), (2, 1)])), (b, np.array([(0, 2)]))]
    selfalign.sample_theta(reward, {"w": 2.0}, D, None)
    R = [[0.1 * i for i in range(4)], [0.3 * i for i in range(3)]]
    expected = [-(2 / 4) * preference_loss(w * np.array(R[0]), [(3, 0), (2, 1)]) - (2 / 3) * preference_loss(w * np.array(R[1]), [(0, 2)])
                for w in (1.0, 5.0)]
    np.testing.assert_allclose(seen["ll"](np.array([[1.0], [5.0]])), expected)
    assert seen["centre"] == [2.0] and np.isneginf(seen["ll"](np.array([[np.inf]]))).all()


def test_proposals_that_do_not_compile_run_or_stay_finite_go_back():
    bad = ["I would reward touching.", "```python\nimport os\n```",
           "```python\ndef reward(contact_force, w=1.0):\n    return {'log': w * np.log(contact_force)}\n```"]
    good = "```python\ndef reward(contact_force, w=1.0):\n    return {'touch': w * contact_force}\n```"
    asked, answers = [], iter([*bad, good])

    def backend(messages):
        asked.append(messages[-1]["content"])
        return Reply(next(answers))
    reward = questions.propose_reward(LLM(backend, lambda exchange: None), TASKS["touch"], tried("touch"))
    assert reward.params == {"w": 1.0}
    assert "no function" in asked[1] and "function" in asked[2] and "term log" in asked[3]


def test_a_failing_llm_costs_no_training(small, monkeypatch, capsys):
    def fails_after_the_proposal(self, messages):
        if "RANKING:" in messages[0]["content"]:
            raise selfalign.LLMError("it is down; try later")
        return Reply((ROOT / "prompts" / "offline" / "touch.txt").read_text())
    monkeypatch.setattr(StandIn, "__call__", fails_after_the_proposal)
    folder = small()
    assert "it is down; try later" in capsys.readouterr().out
    assert len(rows(folder / "metrics.csv")) == 3 and (folder / "policy.pt").exists()


def test_an_empty_name_of_a_model_is_none():
    code = "import os; os.environ['OPENAI_MODEL'] = ''; import cli; assert cli.DEFAULTS['model'] is None"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_usable_proposal_ends_with_the_reason_and_the_transcript(small, monkeypatch):
    monkeypatch.setattr(StandIn, "__call__", lambda self, messages: Reply("no"))
    with pytest.raises(SystemExit, match=r"(?s)no function in the answer.*llm\.jsonl"):
        small()


def test_a_full_disk_costs_nothing_that_was_learnt(small, monkeypatch, capsys):
    real = Path.write_bytes

    def full(self, data):
        if self.parent.name.startswith("run") and self.parent.parent != Path("/") and not self.parent.name.startswith("run0-"):
            raise OSError(28, "No space left on device")
        return real(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    small()
    errors = capsys.readouterr().err
    assert errors.count("No space left on device") <= 7 and "goes to the temporary folder" in errors
    rescue = Path(errors.strip().splitlines()[-1].split(" is in ")[1].rstrip("."))
    assert len(rows(rescue / "metrics.csv")) == 3 and (rescue / "policy.pt").exists()


def test_play_repeats_a_policy_and_saves_frames(small, monkeypatch, tmp_path, capsys):
    folder = small("--reward", "fixed", steps=200)
    monkeypatch.setattr(sys, "argv", ["selfalign.py", "--play", str(folder), "--episodes", "1", "--frames",
                                      str(tmp_path / "frames")])
    try:
        import PIL  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit, match="pip install"):
            selfalign.main()
    else:
        selfalign.main()
        assert len(list((tmp_path / "frames").iterdir())) == 50
    monkeypatch.setattr(sys, "argv", ["selfalign.py", "--play", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no policy to play"):
        selfalign.main()


@pytest.mark.parametrize("flags, words", [
    (["--task", "fly"], "touch"), (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"), (["--device", "abacus"], "--device"),
    (["--seed", str(2 ** 63)], "--seed"), (["--steps", "100000000", "--obs", "pixels"], "memory"), (["--device", "meta"], "--device"),
    (["--gif", "x.gif"], "--play"), (["--episodes", "2"], "--play"), (["--play", "x", "--seed", "2"], "--seed does nothing"),
    (["--resume", "x", "--task", "push"], "does nothing beside --resume"), (["--reward", "sparse", "--model", "m"], "sparse"),
    (["--resume", ""], "--resume is empty"), (["--play", ""], "--play is empty"), (["--out", ""], "--out is empty"),
    (["--proposal", ""], "--proposal is empty"), (["--play", "x", "--gif", "x.mp4"], ".gif"), (["--resume", "nowhere"], "No such file"), (["--llm", "oracle"], "replay:FILE"), (["--llm", "chat"], "--model"), (["--llm", "replay:none.jsonl"], "none.jsonl"),
    (["--out", "/proc/nowhere"], "--out"), (["--out", str(ROOT)], "not empty")])
def test_wrong_flags_get_one_clear_error(flags, words, small, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selfalign.py", *(["--out", str(tmp_path / "x")] if not {"--out", "--play", "--resume"} & set(flags)
                                                        else []), *flags])
    with pytest.raises(SystemExit) as stop:
        selfalign.main()
    assert words in (str(stop.value) + capsys.readouterr().err)


@pytest.mark.parametrize("module, use", [
    ("mh", "p = sample_posterior(lambda t: -t[:, 0], [1.0], steps=(50,)); assert p.mean.shape == (1,)"),
    ("drqv2", "a = DrQV2((3,), (1,), hidden_dim=8); b = ReplayBuffer(9, (3,), (1,)); b.begin([0, 0, 0]); "
              "b.add([0], [0, 0, 0], 1.0, False, True); a.update(b.sample(4), 0)"),
    ("envs", "e = PandaEnv('touch'); e.reset(seed=0); e.step([0, 0, 0, 0]); e.close()"),
    ("reward", "Reward('def r(x, w=1.0): return {\"a\": w * x}', ['x']).total({'x': 1.0})")])
def test_modules_work_alone_in_an_empty_folder(module, use, tmp_path):
    (tmp_path / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
    done = subprocess.run([sys.executable, "-c", f"from {module} import *; {use}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_key_is_nowhere(small, monkeypatch, capsys):
    from test_llm import KEY, Server, completion, http
    proposal = (ROOT / "prompts" / "offline" / "touch.txt").read_text()
    refused = http(json.dumps({"error": {"message": f"{'x' * 175} {KEY} is not valid"}}), "401 Unauthorized")
    server = Server(completion(f"{KEY}\n{proposal}"), completion(f"RANKING: {KEY}"), http(f"<html>{KEY}</html>"), refused)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", "//user:secret-password@"))
    folder = small("--model", "some-model")
    printed = capsys.readouterr()
    assert len(server.requests) >= 4 and "[key]" in (folder / "llm.jsonl").read_text() and "[key]" in printed.out
    for secret in (KEY, KEY[:12], "secret-password"):
        assert secret not in printed.out + printed.err
        assert all(secret.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert len(rows(folder / "metrics.csv")) == 3                    # and nothing was lost


def test_an_analysis_is_told_which_terms_were_no_numbers_after_a_resume_too():
    reward = Reward("def r(x, y, w=1.0):\n    return {'steep': np.exp(x / w), 'root': np.sqrt(y), 'fine': x}", ["x", "y"])
    r_theta = RTheta(reward, np.zeros((3, 2)))
    r_theta(np.array([[1000.0, 0.0], [0.0, -1.0]]))
    assert "steep = inf, root = nan" in questions.strange_note(reward)
    again = RTheta(Reward(reward.source, ["x", "y"]), np.zeros((3, 2)))
    again.load_state_dict(r_theta.state_dict())
    assert questions.strange_note(again.reward) == questions.strange_note(reward)
    assert questions.strange_note(offline_reward("touch")) == ""


def test_losses_that_are_no_numbers_stop_the_run_with_its_last_checkpoint(small, monkeypatch, tmp_path):
    real, calls = selfalign.ReplayBuffer.sample, [0]

    def sample(buffer, size):
        calls[0] += 1
        obs, action, reward, discount, next_obs = real(buffer, size)
        return obs, action, np.full_like(reward, np.nan) if calls[0] > 200 else reward, discount, next_obs
    monkeypatch.setattr(selfalign.ReplayBuffer, "sample", sample)
    with pytest.raises(SystemExit, match="no longer numbers(?s:.*)last checkpoint"):
        small("--reward", "fixed", "--out", str(tmp_path / "nan"))
    assert calls[0] == 201
    state = torch.load(tmp_path / "nan" / "checkpoint.pt", weights_only=True)
    ahead = 50 if cli.second_core("cpu") else 0            # how far training is when it takes the result of an evaluation
    assert state["step"] == 400 + ahead and all(torch.isfinite(p).all() for p in state["agent"]["critic"].values())


def test_a_trajectory_of_infinite_return_does_not_cost_the_others():
    names = list(TASKS["touch"].features)
    reward = Reward("def r(contact_force, w=1.0, scale=0.1):\n    return {'a': w * contact_force, 'b': 0 * np.exp(contact_force / scale)}", names)
    taus = touches(6)
    taus[3][:, names.index("contact_force")] = 1e6
    pairs = selfalign.pairs_of([[5], [4], [3], [2], [1], [0]])
    posterior = selfalign.sample_theta(reward, reward.params, [(taus, pairs)], np.random.default_rng(0))
    without = selfalign.sample_theta(reward, reward.params, [(taus, pairs[(pairs != 3).all(axis=1)])], np.random.default_rng(0))
    np.testing.assert_array_equal(posterior.samples, without.samples)
    assert posterior.samples[..., 0].mean() > 1
