"""The README's tables of results against the raw numbers in results/."""

import csv
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

import bench
import study
from selfalign import being_learnt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = {}                            # (proposal, task, reward, seed): [(step, success), ...]
with open(ROOT / "results" / "metrics.csv") as file:
    for row in csv.DictReader(file):
        key = row["proposal"], row["task"], row["reward"], int(row["seed"])
        RUNS.setdefault(key, []).append((int(row["step"]), float(row["success"])))
CHANGED = set()                      # runs in which θ changed
with open(ROOT / "results" / "theta.csv") as file:
    for row in csv.DictReader(file):
        if row["cause"] != "proposal":
            CHANGED.add((row["proposal"], row["task"], row["reward"], int(row["seed"])))


def steps_to_success(proposal, task, reward, seed):
    """The first of two consecutive evaluations in which all episodes succeed; infinity where there are none.

    Where θ never changed, the run of the fixed reward is the same and is not kept twice.
    """
    key = proposal, task, reward, seed
    if reward == "fixed" and key not in RUNS and (proposal, task, "selfalign", seed) not in CHANGED:
        key = proposal, task, "selfalign", seed
    run = RUNS[key]
    assert all(later - step == 1000 for (step, _), (later, _) in zip(run, run[1:]))
    reached = [step for (step, now), (_, then) in zip(run, run[1:]) if now == then == 1]
    assert reached or run[-1][0] == 40_000
    return reached[0] if reached else float("inf")


def runs_by(name, *key):
    """{values of `key`: {reward: [(step, success), ...]}} of a file in results/."""
    runs = {}
    with open(ROOT / "results" / f"{name}.csv") as file:
        for row in csv.DictReader(file):
            case = runs.setdefault(tuple(row[part] for part in key), {})
            case.setdefault(row["reward"], []).append((int(row["step"]), float(row["success"])))
    return runs


def left_to_itself(run, update):
    """Whether the rule leaves θ alone at `update` steps of this run; None where it had ended, or learnt, by then."""
    before = [success for step, success in run if step <= update]
    if run[-1][0] <= update or study.steps_to_success([*enumerate(before)]) < float("inf"):
        return None
    return bool(being_learnt(before))


def cell(steps):
    return "–" if steps == float("inf") else f"{steps:,.0f}"


def stand_in_row(task):
    steps = [steps_to_success("stand-in", task, "selfalign", seed) for seed in range(1, 11)]
    return f"| {task} | {' '.join(map(cell, steps))} | {cell(statistics.median(steps))} |"


def real_row(task, proposal):
    seeds = [seed for seed in (1, 2, 3) if (proposal, task, "selfalign", seed) in RUNS]
    both = [[cell(steps_to_success(proposal, task, reward, seed)) for seed in seeds] for reward in ("fixed", "selfalign")]
    marks = ["" if (proposal, task, "selfalign", seed) in CHANGED else "=" for seed in seeds]
    return f"| {task} {proposal} | {' '.join(both[0])} | {' '.join(a + b for a, b in zip(marks, both[1]))} |"


def asked_row(task):
    steps = [steps_to_success("asked", task, "selfalign", seed) for seed in sorted(
        seed for proposal, name, reward, seed in RUNS if (proposal, name, reward) == ("asked", task, "selfalign"))]
    return f"| {task} | {' | '.join(map(cell, steps))} |"


def rewritten_row(name, task, proposal):
    both = [[cell(steps_to_success(proposal, task, reward, seed)) for seed in (1, 2, 3)] for reward in ("selfalign", "rewrite")]
    return f"| {name} | {' '.join(both[0])} | {' '.join(both[1])} |"


WRONG = runs_by("wrong", "proposal", "parameter", "factor")
STUDIES = "methods", "weak", "noise", "parts", "often", "pixels"
REAL = sorted({(task, proposal) for proposal, task, *_ in RUNS if proposal.isdigit()})


@pytest.mark.parametrize("task", ["touch", "grasp", "push"])
def test_steps_with_the_stand_in_and_with_a_language_model(task):
    assert stand_in_row(task) in README and asked_row(task) in README
    assert steps_to_success("asked", "touch", "fixed", 64) == float("inf") and "with its first reward, not within 40,000" in README


@pytest.mark.parametrize("task, proposal", REAL)
def test_steps_with_proposals_of_a_language_model(task, proposal):
    assert real_row(task, proposal) in README


def test_what_a_changed_theta_was_good_for():
    cases = [(proposal, task, seed) for task, proposal in REAL for seed in (1, 2, 3)]
    both = [[steps_to_success(proposal, task, reward, seed) for reward in ("fixed", "selfalign")] for proposal, task, seed in cases
            if (proposal, task, "selfalign", seed) in CHANGED]
    later = sorted(aligned - fixed for fixed, aligned in both if max(fixed, aligned) < float("inf"))
    assert len(cases) == 54 and later == [-2000, 2000, 4000, 6000, 10_000]
    only = sum(fixed == float("inf") > aligned for fixed, aligned in both)
    neither = sum(fixed == aligned == float("inf") for fixed, aligned in both)
    assert (len(both), only, neither) == (8, 2, 1)
    assert ("θ changed in 8 of these 54 cases: two were learnt only so (grasp 6, seeds 1 and 3), one earlier (by 2,000 steps), "
            "four later (by 2,000 to 10,000), one by neither.") in " ".join(README.split())


def test_seeds_that_were_run_once():
    runs = {}
    for (name, seed), both in runs_by("unseen", "proposal", "seed").items():
        runs.setdefault(name, {})[int(seed)] = both
    assert f"seeds 11 and 12, took {' and '.join(cell(study.steps_to_success(both['selfalign'])) for both in runs.pop('touch-stand-in').values())}" in README
    both, changed = {}, []
    for name, seeds in runs.items():
        for seed, these in seeds.items():                    # where θ never changed, the run stands there once
            assert all(len(run) == 39 or study.steps_to_success(run) < float("inf") for run in these.values())
            steps = [study.steps_to_success(these.get(reward, these["selfalign"])) for reward in ("fixed", "selfalign")]
            both.setdefault(name, []).append((cell(steps[0]), "=" * (len(these) == 1) + cell(steps[1])))
            changed += [steps] if len(these) == 2 else []
        told = "6 to 8" if name == "push-9" else "4 and 5"
        fixed, aligned = (" ".join(column) for column in zip(*both[name]))
        assert list(seeds) == ([6, 7, 8] if name == "push-9" else [4, 5])
        assert f"| {name.replace('-', ' ')}, {told} | {fixed} | {aligned} |" in README
    later = sorted(aligned - fixed for fixed, aligned in changed if fixed < float("inf"))
    assert sum(map(len, both.values())) == 17 and len(changed) == 6 and later == [-22_000, -15_000, -8_000, 4_000]
    assert all(aligned < float("inf") for _, aligned in changed)
    assert ("θ changed in 6 of these 17 cases: two were learnt only so, three earlier (by 8,000 to 22,000 steps), one later (by 4,000);"
            in " ".join(README.split()))


def test_no_theta_changes_while_a_skill_is_being_learnt():
    """Neither by what is known of θ, nor by where runs of a fixed reward and of selfalign part."""
    parted = 0
    for both in [*runs_by("metrics", "proposal", "task", "seed").values(), *WRONG.values(), *runs_by("unseen", "proposal", "seed").values()]:
        if {"fixed", "selfalign"} <= set(both):
            step = next((a[0] for a, b in zip(both["fixed"], both["selfalign"]) if a != b), None)
            if step is None:                               # the one had fewer steps
                continue
            update, parted = (step - 1) // 10_000 * 10_000, parted + 1
            assert not being_learnt([success for step, success in both["fixed"] if step <= update])
    assert parted > 30

    changes = {key: {} for key in RUNS}
    with open(ROOT / "results" / "theta.csv") as file:
        for row in csv.DictReader(file):
            changes.setdefault((row["proposal"], row["task"], row["reward"], int(row["seed"])), {})[int(row["step"])] = row["cause"]
    both = [(run, changes[key]) for key, run in RUNS.items()]
    for name in STUDIES:
        for seeds in study.read(ROOT / "results" / f"study-{name}.csv").values():
            both += [(run["success"], [step for measure, rows in run.items() if measure.startswith("θ ") for step, _ in rows])
                     for run in seeds.values()]
    seen = 0
    for evaluations, steps in both:
        for step in filter(None, steps):
            assert not being_learnt([success for at, success in evaluations if at <= step])
            seen += 1
    assert seen > 100


def test_what_becomes_of_a_skill_that_is_left_alone():
    """Of runs with a fixed reward, or with a θ that never changed, each once."""
    runs = [run for (proposal, task, reward, seed), run in RUNS.items()
            if reward == "fixed" or reward == "selfalign" and (proposal, task, reward, seed) not in CHANGED]
    runs += [both.get("fixed", both.get("selfalign")) for both in WRONG.values()]
    for name in ("methods", "weak"):
        runs += [run["success"] for (_, variant), seeds in study.read(ROOT / "results" / f"study-{name}.csv").items()
                 if variant.endswith("fixed") for run in seeds.values()]

    def counted(runs):
        """{(update, whether θ is left alone): (runs, how many of them were learnt)}"""
        counts = {}
        for run in runs:
            for update in (10_000, 20_000, 30_000):
                counts.setdefault((update, left_to_itself(run, update)), []).append(study.steps_to_success(run) < float("inf"))
        return {key: (len(learnt), sum(learnt)) for key, learnt in counts.items()}
    told = counted(set(map(tuple, runs)))
    (left, then), (asked, too) = told[10_000, True], told[10_000, False]
    text = " ".join(README.split())
    assert f"Of {left} different runs with a fixed reward that today's rule would leave alone at 10,000 steps, {then} were learnt" in text
    assert f"within 40,000, of the {asked} others {too}." in text
    new = counted(both.get("fixed", both["selfalign"]) for (proposal, _), both in runs_by("unseen", "proposal", "seed").items()
                  if proposal != "touch-stand-in")
    assert new[10_000, True] == (5, 4) and new[20_000, True] == (7, 6)
    assert "On the unseen seeds 4 of 5 at 10,000 and 6 of 7 at 20,000." in text
    assert told[20_000, True] == (24, 21) and told[30_000, True] == (11, 6)
    assert "of 24 at 20,000 steps 21 were learnt, of 11 at 30,000 six" in text


def test_steps_where_a_language_model_writes_the_reward_anew():
    for row in ("touch, the stand-in's", "touch", "stand-in"), ("grasp 6", "grasp", "6"):
        assert rewritten_row(*row) in README
        assert CHANGED >= {(*row[:0:-1], "rewrite", seed) for seed in (1, 2, 3)}


def pixel_row(task, seed, run):
    """A run of study-pixels.csv."""
    steps, ((_, seconds),), ((_, judged),) = study.steps_to_success(run["success"]), run["seconds"], run[f"success of {study.JUDGED}"]
    changed = sorted({step for name, rows in run.items() if name.startswith("θ ") for step, _ in rows} - {0})
    return f"| {task} {seed} | {cell(steps)} | {seconds / 60:.1f} | {', '.join(f'{step:,}' for step in changed) or '–'} | {judged:.0%} |"


def test_runs_from_pixels():
    runs = {task: seeds for (task, _), seeds in study.read(ROOT / "results" / "study-pixels.csv").items()}
    for task, seeds in runs.items():
        for seed, run in seeds.items():
            assert pixel_row(task, seed, run) in README
            ends = max(step for step, _ in run["success"])
            assert study.steps_to_success(run["success"]) < float("inf") or ends == 60_000
    first, second = ({step: success for step, success in runs["touch"][seed]["success"]} for seed in (1, 2))
    stood = [first[step] for step in range(14_000, 21_000, 1_000)]
    assert (min(stood), max(stood), first[21_000]) == (0.1, 0.35, 0.8)
    assert runs["touch"][1]["θ contact_threshold"][-1] == (20_000, 0.1725) and "0.172 N" in README
    stood = [second[step] for step in range(11_000, 47_000, 1_000)]
    assert (min(stood), max(stood)) == (0.5, 0.9)
    third = runs["touch"][3]
    assert dict(third["success"])[10_000] == 0.25 and len(third["θ contact_threshold"]) == 2
    assert f"({third['θ contact_threshold'][1][1]:.2f} N, 90 % interval {third['low θ contact_threshold'][0][1]:.3f} to " \
           f"{third['high θ contact_threshold'][0][1]:.2f})" in README
    for seed, step, success in ((2, 15_000, 0.75), (3, 12_000, 0.7)):
        lifted = runs["grasp"][seed]
        assert lifted["θ lift_weight"] == [(0, 2), (10_000, 6)] and dict(lifted["success"])[step] == success
        assert max(success for step, success in lifted["success"] if step <= 10_000) == 0


def test_trials_from_pixels():
    runs, own, ends = {}, {}, {}
    with open(ROOT / "results" / "pixels.csv") as file:
        for row in csv.DictReader(file):
            names = "encoder", "disc", "camera", "batch", "lr", "noise until", "averaged", "reward", "threads"
            key = row["task"], int(row["seed"]), *(row[name] for name in names)
            runs.setdefault(key, []).append((int(row["step"]), float(row["success"])))
            if row["with the encoder itself"]:
                own.setdefault(key, []).append((float(row["success"]), float(row["with the encoder itself"])))
            ends[key] = row
    def trial(*some, times=1):
        """The run of pixels.csv whose row holds all of these."""
        found = [key for key in runs if {*some} <= {*key}]
        assert len(found) == times, found
        return found[0]
    published = [trial("push", seed, "2 1 1 1", "2", "selfalign") for seed in (1, 2, 3)]
    assert [study.steps_to_success(runs[key]) for key in published] == [20_000, 18_000, 20_000]
    assert [f"{float(ends[key]['seconds']) / 60:.1f}" for key in published] == ["19.5", "19.0", "20.4"]
    assert {success for _, success in runs[trial("grasp", "2 1 1 1")]} == {0.0}
    former = {(task, seed): study.steps_to_success(runs[trial(task, seed, "2 2 1 1", "38", "3e-4", "actor", "yes" if task == "touch" else "no")])
              for task in ("touch", "grasp", "push") for seed in (1, 2)}
    assert [steps for steps in former.values() if steps < float("inf")] == [12_000, 17_000, 13_000]
    touch = dict(runs[trial("touch", "no", "38")])
    stood = sorted(touch[step] for step in range(17_000, 35_000, 1_000))
    assert (stood[0], stood[-2], stood[-1]) == (0.5, 0.8, 1.0)
    assert max(step for step, _ in runs[trial("touch", "29")]) == 15_000
    assert all((success >= 0.8) == (step >= 34_000) and (success == 0) == (step < 34_000) for step, success in runs[trial("grasp", "yes")])
    key = trial("touch", 1, "encoder and actor", "3e-4")
    pairs = [pair for pair, (step, _) in zip(own[key], runs[key], strict=True) if step >= 8_000]
    averaged, itself = (statistics.mean(column) for column in zip(*pairs))
    text = " ".join(README.split())
    assert f"in {len(pairs)} evaluations" in text and f"{averaged:.0%} of attempts succeeded, and {itself:.0%}" in text
    assert max(success for _, success in runs[trial("grasp", "20000")]) == 0 and max(runs[trial("grasp", "20000")])[0] == 25_000
    fast = dict(runs[trial("touch", "1e-3")])
    assert max(fast[step] for step in range(2_000, 13_000, 1_000)) == 0.1
    assert (fast[19_000], fast[23_000]) == (0.9, 0.25)
    assert max(runs[trial("selfalign, proposal 1")]) == (17_000, 0.95)

def test_the_bench():
    with open(ROOT / "results" / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    text = " ".join(README.split())
    losses = []
    for wrong, count in ((False, 18), (True, 88)):
        some = [row for row in rows if bool(row["parameter"]) == wrong]
        held, held_after, late, late_after = (statistics.mean(float(row[f"{kind}_{when}"]) for row in some)
                                              for kind in ("held", "late") for when in ("before", "after"))
        assert len(some) == count and f"({count} cases)" in text
        for before, after in ((held, held_after), (late, late_after)):
            assert re.search(rf"{before:.3f} (of the pairs before )?and {after:.3f}", text)
        losses += [round(float(row[f"{kind}_before"]) - float(row[f"{kind}_after"]), 3) for row in some for kind in ("held", "late")]
    assert sorted(loss for loss in losses if loss > 0.01) == [0.017, 0.036]
    assert all(float(row["rhat"]) < 1.05 and float(row["ess"]) > 200 for row in rows if row["rhat"] != "nan")


KNOWN = {"grasp-4": ("close_weight 10", "grip_weight 10", "reach_scale 0.1"),     # to break a run before the rule for no success was chosen
         "grasp-7": ("grip_weight 10", "reach_weight 10", "force_weight 10"), "touch-4": ("reach_scale 0.1",),
         "touch-7": ("reach_scale 0.1", "speed_weight 10", "touch_weight 0.1", "displacement_weight 0.1", "displacement_weight 10")}


def test_wrong_numbers():
    text = " ".join(README.split())

    def learnt(run, steps):
        return any(now == then == 1 and step <= steps for (_, now), (step, then) in zip(run, run[1:]))
    runs = WRONG
    assert len(runs) == 88 and "the 88 cases" in text

    def results(steps):
        """Cases that fixed does not learn, and by case whether selfalign does. The run stands once where θ never changed."""
        broken = [case for case, both in runs.items() if not learnt(both.get("fixed", both.get("selfalign")), steps)]
        for case in broken:                              # each has had all its steps
            assert all(learnt(run, steps) or run[-1][0] >= steps for run in runs[case].values()), case
        return broken, {case: learnt(both["selfalign"], steps) for case, both in runs.items() if "selfalign" in both}

    broken, aligned = results(30_000)
    fresh = [case for case in broken if f"{case[1]} {case[2]}" not in KNOWN.get(case[0], ())]
    others = [case for case in runs if case not in broken]
    same = [case for case in others if set(runs[case]) == {"selfalign"}]               # θ never changed
    changed = {case: [study.steps_to_success(runs[case][reward]) for reward in ("fixed", "selfalign")]
               for case in others if len(runs[case]) == 2}
    later = sorted(steps - fixed for fixed, steps in changed.values())
    assert len(later) == 8 and later[:3] == [-9_000, -1_000, 1_000] and later[-1] == 5_000
    assert f"within 30,000 steps fixed did not learn {len(broken)} of them" in text and len(broken) - len(fresh) == 12
    assert (f"selfalign learnt {sum(map(aligned.get, broken))}. Of the {len(others)} others, θ never changed in {len(same)} and changed in "
            f"{len(changed)}: six were learnt later (by 1,000 to 5,000 steps), two earlier, and none was lost.") in text
    assert len(same) + len(changed) == len(others)
    assert f"Of the {len(fresh)} found afterwards it learnt {sum(map(aligned.get, fresh))} within 30,000" in text
    broken, aligned = results(40_000)
    assert f"Within 40,000 steps fixed did not learn {len(broken)}, of which selfalign learnt {sum(map(aligned.get, broken))}." in text


def test_touch_with_a_fixed_reward_and_3_8_times_the_steps():
    runs = {}
    with open(ROOT / "results" / "touch_fixed_61000.csv") as file:
        for row in csv.DictReader(file):
            runs.setdefault(int(row["seed"]), []).append((int(row["step"]), float(row["success"])))
    aligned = study.read(ROOT / "results" / "study-methods.csv")["touch", "selfalign"]
    assert 61_000 > 3.8 * statistics.median(study.steps_to_success(run["success"]) for run in aligned.values())
    assert list(runs) == list(aligned) and {run[-1][0] for run in runs.values()} == {61_000}
    assert {study.steps_to_success(run) for run in runs.values()} == {float("inf")}
    assert f"never above {max(success for run in runs.values() for _, success in run):.0%}".replace("%", " %") in README


def test_touch_without_its_term_for_speed():
    runs = {}
    with open(ROOT / "results" / "touch_without_speed.csv") as file:
        for row in csv.DictReader(file):
            runs.setdefault(int(row["seed"]), []).append((int(row["step"]), float(row["success"])))
    steps = [next(step for (step, now), (_, then) in zip(runs[seed], runs[seed][1:]) if now == then == 1) for seed in range(1, 11)]
    assert f"a median of {statistics.median(steps):,.0f} steps on these ten" in README
    near = [[step for step, success in run if success >= 0.95] for run in runs.values()]
    assert max(steps[-1] - steps[0] for steps in near) >= 10_000 and "near there for 10,000 steps" in README


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "pixels"])      # of which each run has a row
def test_tables_of_studies(name):
    runs = study.read(ROOT / "results" / f"study-{name}.csv")
    for line in [*study.table(runs), *(study.theta_table(runs) if name in ("methods", "weak") else [])]:
        assert line in README


def test_what_is_said_of_the_studies_in_words():
    text = " ".join(README.split())
    methods, weak, noise = (study.read(ROOT / "results" / f"study-{name}.csv") for name in ("methods", "weak", "noise"))

    def last(seeds, name, bound=""):
        return [run[f"{bound}θ {name}"][-1][1] for run in seeds.values()]
    thresholds = last(methods["touch", "selfalign"], "contact_threshold")
    assert (f"from 1 N to {statistics.median(thresholds):.3f} N (median; {min(thresholds):.2f} to {max(thresholds):.2f} N over the seeds, "
            in text)
    high = last(methods["touch", "selfalign"], "contact_threshold", "high ")
    assert sum(bound > 1 for bound in high) == 2 and "of two of which the 90 % interval still holds 1 N" in text
    steps = [[study.steps_to_success(run["success"]) for run in noise["touch", f"{share} flipped"].values()] for share in ("10%", "20%")]
    assert f"With a tenth the slowest of five seeds takes {max(steps[0]):,} steps, with a fifth {max(steps[1]):,};" in text
    thresholds = [value for share in ("10%", "20%") for value in last(noise["touch", f"{share} flipped"], "contact_threshold")]
    assert f"lies between {min(thresholds):.2f} and {max(thresholds):.2f} N" in text
    exponential = weak["push", "exponential, selfalign"]
    ratios = np.divide(last(exponential, "push_weight"), last(exponential, "reach_weight"))
    assert f"weighs {ratios.min():.1f} to {ratios.max():.1f} times as much as reaching, by seed" in text
    assert round(0.1 / statistics.median(last(exponential, "push_scale"))) == 7 and "its scale is a seventh of what it was" in text
    often = study.read(ROOT / "results" / "study-often.csv")
    early, half, usual = ([study.steps_to_success(run["success"]) for run in seeds.values()] for seeds in often.values())
    assert [sum(steps <= 10_000 for steps in of_five) for of_five in (early, half, usual)] == [3, 1, 0]
    assert [[steps for steps in of_five if steps > max(usual)] for of_five in (early, half)] == [[20_000, 17_000], [17_000]]
    assert sorted(len({step for step, _ in run["θ contact_threshold"]}) - 1 for run in
                  [*often["touch", "every 2,500 steps"].values(), *often["touch", "every 5,000 steps"].values()]) == [1] * 9 + [2]
    parts = study.read(ROOT / "results" / "study-parts.csv")
    steps = {variant: [study.steps_to_success(run["success"]) for run in seeds.values()] for (_, variant), seeds in parts.items()}
    assert steps["no analysis"] == steps["selfalign"] and steps["exponential, no analysis"] == steps["exponential, selfalign"]
    fixed = [study.steps_to_success(run["success"]) for run in weak["push", "exponential, fixed"].values()]
    assert steps["exponential, no sampler"] == fixed and min(steps["no sampler"]) == float("inf")
    slowest = max(steps["exponential, selfalign"])
    slower = [sorted(n for n in steps[f"exponential, {part}"] if n > slowest) for part in ("pairs of weight 1", "K = 24", "K = 12")]
    assert slowest == 17_000 and slower == [[28_000], [18_000, 24_000], [25_000, float("inf")]]
    assert ("one of five takes 28,000 steps where the slowest took 17,000, with K = 24 two take 18,000 and 24,000, with K = 12 one takes "
            "25,000 and one is not learnt.") in text
    sure = parts["push", "exponential, pairs of weight 1"]
    assert f"from {min(last(sure, 'push_weight')):.1f} to {max(last(sure, 'push_weight')):,.0f}; most of their intervals do not meet" in text
    judged = [run[f"success of {study.JUDGED}"][0][1] for seeds in weak.values() for run in seeds.values()
              if study.steps_to_success(run["success"]) < float("inf")]
    assert f"had stopped succeed in {100 * min(judged):.0f} to {100 * max(judged):.0f} %" in text
    grasp = methods["grasp", "fixed"], methods["grasp", "selfalign"]
    later = [study.steps_to_success(aligned["success"]) - study.steps_to_success(fixed["success"])
             for fixed, aligned in zip(*(both.values() for both in grasp))]
    changed = [any(len({value for _, value in run[name]}) > 1 for name in run if name.startswith("θ ")) for run in grasp[1].values()]
    assert sum(changed) == 1 and "one of five runs changed θ" in text
    assert [steps for steps, new in zip(later, changed) if new] == [4000] and "4,000 steps more" in text and sum(later) == 4000


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "transcripts").glob("*.jsonl")), ids=lambda path: path.stem)
def test_transcripts_were_asked_in_the_words_of_today(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        exchange, place = json.loads(line), 0
        for words in re.split(r"\$\w+", (ROOT / "prompts" / f"{exchange['kind']}.txt").read_text(encoding="utf-8")):
            place = exchange["prompt"].find(words, place)
            assert place >= 0, words
            place += len(words)


def test_whatever_the_readme_shows_or_names_is_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    assert {path.stem for path in (ROOT / "results").glob("study-*.csv")} == {f"study-{name}" for name in STUDIES}


def test_the_table_of_speeds():
    assert "\n".join(bench.table(bench.read(ROOT / "results" / "speed.csv"))) in README


if __name__ == "__main__":           # the tables' rows, to be put into the README
    tasks = ["touch", "grasp", "push"]
    print(*map(stand_in_row, tasks), "", *map(asked_row, tasks), "", *(real_row(*key) for key in REAL), sep="\n")
