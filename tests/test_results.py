"""The README's table of results against the raw numbers in results/."""

import csv
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
with open(ROOT / "results" / "metrics.csv") as file:
    ROWS = list(csv.DictReader(file))


def evaluations(task, reward, seed):
    return [(int(row["step"]), float(row["success"])) for row in ROWS
            if (row["task"], row["reward"], row["seed"]) == (task, reward, str(seed))]


def steps_to_success(task, seed):
    """The first of two consecutive evaluations in which all episodes succeed; infinity where there are none."""
    run = evaluations(task, "selfalign", seed)
    assert run and all(later - step == 1000 for (step, _), (later, _) in zip(run, run[1:]))
    return next((step for (step, now), (_, then) in zip(run, run[1:]) if now == then == 1), float("inf"))


@pytest.mark.parametrize("task", ["touch", "grasp", "push"])
def test_steps_to_success_are_those_of_the_raw_numbers(task):
    line = re.search(rf"^\| {task} \|(.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    cells = [[float("inf") if word == "–" else int(word.replace(",", "")) for word in cell.split()]
             for cell in line.strip(" |").split("|")]
    for (told, median), seeds in zip((cells[:2], cells[2:]), (range(1, 6), range(6, 11))):
        measured = [steps_to_success(task, seed) for seed in seeds]
        assert told == measured and median == [statistics.median(measured)]


def test_the_fixed_reward_came_as_far_as_is_told():
    best = [max(success for _, success in evaluations("touch", "fixed", seed)) for seed in (1, 2)]
    assert best == [0.1, 0.4] and "10 % and 40 % at best" in (ROOT / "README.md").read_text(encoding="utf-8")
