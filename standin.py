"""NOT a language model: a scripted stand-in for one, so that the whole loop runs without a key and without network.

    llm = LLM(StandIn(), record=print)

It answers from the prompt's text alone. Rankings follow B-Pref's scripted teachers (Lee et al., 2021) and work for any
task: a progress score for each attempt, read off its description, and equal preference where a score is within EQUAL of
the best of its group. For touch, grasp and push, proposals are written out beforehand in prompts/offline/, with the first
numbers that the paper reports (contact threshold 1 N, push weight 2.0), and failure analyses try out the reward in the
prompt, whoever wrote it, on typical readings of each stage; for other tasks they change nothing.
"""

import json
import re

import numpy as np

from llm import PROMPTS, LLMError, Reply, prompt, read_code
from reward import Reward, RewardError

EQUAL = 0.1             # progress scores this close to the best of their group are equal to it
FACTORS = (3.0, 0.3, 10.0, 0.1)   # by which an analysis may change a parameter, mildest first
CHANGED = 3             # parameters in one analysis, at most
PAYS = 0.3              # share of all there is to gain up to the next stage which that stage should pay at least
PAYS_STUCK = 0.5        # ... where nothing has succeeded in the last ten evaluations: as much as all before it

# Typical readings at the start of an attempt and at each stage, as the features' descriptions in the prompt give them.
STAGES = {
    "touch": (dict(hand_to_block=0.15, hand_beside_block=0.13, hand_above_block=0.07, hand_height=0.09, hand_speed=0.2,
                   contact_force=0.0, block_displacement=0.0, block_speed=0.0),
              dict(hand_to_block=0.05, hand_beside_block=0.045, hand_above_block=0.01, hand_height=0.03, hand_speed=0.05),
              dict(hand_to_block=0.033, hand_beside_block=0.032, contact_force=0.15, block_displacement=0.01)),
    "grasp": (dict(hand_to_block=0.13, hand_beside_block=0.05, hand_above_block=0.12, hand_height=0.14, gripper_opening=0.07,
                   contact_force=0.0, grip_force=0.0, block_height=0.0, block_displacement=0.0),
              dict(hand_to_block=0.01, hand_beside_block=0.008, hand_above_block=0.005, hand_height=0.025),
              dict(gripper_opening=0.042, contact_force=6.0, grip_force=3.0, block_displacement=0.01),
              dict(hand_height=0.11, block_height=0.085, block_displacement=0.03)),
    "push": (dict(hand_to_block=0.075, hand_beside_block=0.074, hand_above_block=0.01, hand_height=0.03, hand_speed=0.15,
                  contact_force=0.0, block_displacement=0.0, block_speed=0.0, block_to_goal=0.13, push_alignment=0.98),
             dict(hand_to_block=0.033, hand_beside_block=0.032, contact_force=0.25, hand_speed=0.1),
             dict(block_to_goal=0.01, block_displacement=0.12, block_speed=0.0, hand_speed=0.02, contact_force=0.05)),
}


class StandIn:
    """A backend of `llm.LLM`: maps chat messages to a `Reply`. Raises LLMError for prompts that it does not know."""

    def __call__(self, messages):
        text = messages[0]["content"]
        task = re.search(r"^Task: (\w+)", text, flags=re.MULTILINE)
        if len(messages) > 1 or not task:
            raise LLMError("the offline stand-in knows the questions in prompts/ only, and no other answers to them; set "
                           "OPENAI_API_KEY or OPENAI_BASE_URL to ask a real LLM")
        if "write the better reward function" in text:
            raise LLMError("the offline stand-in writes no code; set OPENAI_API_KEY or OPENAI_BASE_URL to ask a real LLM")
        if '"blocked_by"' in text:
            return Reply(analyse(task[1], text))
        if "RANKING:" in text:
            return Reply(rank(text))
        if not (PROMPTS / "offline" / f"{task[1]}.txt").exists():
            raise LLMError(f"the offline stand-in has no proposal for {task[1]}: start from one of your own with --proposal FILE, "
                           "or set OPENAI_API_KEY or OPENAI_BASE_URL to ask a real LLM")
        return Reply(prompt(f"offline/{task[1]}"))


def attempts_of(text):
    """What the descriptions in a prompt say: {number: attempt}, see `attempt_of`."""
    bodies = re.findall(r"^Attempt (\d+):(.*?)(?=^Attempt \d+:|^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return {int(number): attempt_of(body) for number, body in bodies}


def attempt_of(body):
    """One description as a dict: `fulfils`; `readings`, (first, last, lowest, highest) by feature; `steps` and `run` by
    condition, in how many steps it held and its longest run before a limit broke; `excess`, from 1 on, how far a limit was
    broken at worst, None where all were kept."""
    readings = {}
    for name, row in re.findall(r"^ +(\w+) (-?[\d.]+(?:e[-+]\d+)? .*\| [-\d].*)$", body, re.MULTILINE):
        moments, extremes = row.split("|")
        readings[name] = (float(moments.split()[0]), float(moments.split()[-1]), *map(float, extremes.split()))
    steps, run = {}, {}
    for condition, held, rest in re.findall(r"^ +(\w+ [<>]=? .*?): (\d+) of \d+ steps(.*)$", body, re.MULTILINE):
        runs = re.findall(r"longest run (\d+)|, (\d+) before a limit broke", rest)
        steps[condition], run[condition] = int(held), int("".join(runs[-1])) if runs else 0
    excess = [worst / limit if worst > limit > 0 else 1 + abs(worst - limit) for limit, worst in (map(float, both) for both in
              re.findall(r"^ +limit \w+ [<>]=? (\S+): broken .* (?:highest|lowest) reading (\S+)$", body, re.MULTILINE))]
    return {"fulfils": " fulfils the task" in body.split("\n")[0], "readings": readings, "steps": steps, "run": run,
            "excess": max(excess, default=None)}


def score(attempt, steps):
    """How far an attempt gets: 1 for each stage and 2 for the last, success, kept up for `steps` steps running.

    A stage that is not reached counts by the share of the way that its readings go, and later ones do not count. An
    attempt that breaks a limit stays below every one that keeps them and comes near; 2 more for fulfilling the task, and
    up to 0.5 for keeping it up.
    """
    def way(condition):
        name, sign, value = condition.split(" ")
        first, _, low, high = attempt["readings"][name]
        best, value = low if sign == "<=" else high, float(value)
        if {"<=": best <= value, ">": best > value, ">=": best >= value}[sign]:
            return 1.0
        return (best - first) / (value - first) if value != first else 0.0

    stages = {stage: stage.split(" and ") for stage in attempt["run"]}
    *_, goal = stages
    total = min(attempt["run"][goal], steps) / steps
    for stage, conditions in stages.items():
        reached = attempt["run"][stage] > 0 or attempt["fulfils"]
        total += 1.0 if reached else np.mean([way(condition) for condition in conditions])
        if not reached:
            break
    if attempt["excess"]:                                         # rough contact is worse than none
        total = 0.5 * way(stages[next(iter(stages))][0]) / attempt["excess"]
    return float(total + attempt["fulfils"] * (2 + 0.5 * attempt["steps"][goal] / 50))


def scores_of(text):
    """The score of each attempt that is described in a prompt, by number. Success takes as many steps as the task says."""
    steps = re.search(r"(\d+) consecutive", text)
    return {number: score(attempt, int(steps[1]) if steps else 1) for number, attempt in attempts_of(text).items()}


def rank(text):
    """The answer to prompts/rank.txt: attempts by score, those closer than EQUAL to the best of their group equal."""
    scores = scores_of(text)
    ranking, best = "", None
    for number in sorted(scores, key=scores.get, reverse=True):
        equal = best is not None and best - scores[number] < EQUAL
        ranking += f" = {number}" if equal else f" > {number}"
        best = best if equal else scores[number]
    listed = "\n".join(f"Attempt {number}: progress {value:.2f}" for number, value in scores.items())
    return f"Scripted preferences of the offline stand-in, not an LLM's.\n{listed}\n\nRANKING: {ranking[3:]}"


def analyse(task, text):
    """The answer to prompts/analyse.txt: the mildest change of a few parameters after which the blocked stage pays enough."""
    if task not in STAGES:
        return scripted_analysis("no parameter that the stand-in could tell: it has typical readings of touch, grasp and push only", {})
    try:
        reward = Reward(read_code(text), list(STAGES[task][0]))
    except (RewardError, ValueError) as error:
        raise LLMError(f"the offline stand-in cannot read the reward in the prompt: {error}") from None
    stage, stages = {}, []
    for change in STAGES[task]:
        stage = {**stage, **change}
        stages.append(stage)
    # Readings at each stage and, between two of them, half of the way.
    points = [stages[0]] + [point for one, other in zip(stages, stages[1:])
                            for point in ({name: (one[name] + other[name]) / 2 for name in one}, other)]
    features = {name: np.array([point[name] for point in points]) for name in points[0]}

    # The stage that is blocked: the one after the last whose condition at least half of the attempts meet.
    met = [list(attempt["steps"].values()) for attempt in attempts_of(text).values()]
    reached = [k for k in range(len(stages) - 1) if met and np.mean([steps[k] > 0 for steps in met]) >= 0.5]
    blocked = min(max(reached, default=-1) + 1, len(stages) - 2)

    def gains(params):
        """What each stage pays more than the one before, up to the blocked one: the mean of what the whole way there pays
        and twice what its first half does, so that a reward at the end alone counts half."""
        r = reward.total(features, params)
        start, halfway, end = r[:-2:2], r[1::2], r[2::2]
        return ((end - start) / 2 + (halfway - start))[:blocked + 1]

    def share(params):
        """What the blocked stage pays, as a share of all gains and losses up to it."""
        all_ = np.abs(gains(params)).sum()
        return float(gains(params)[-1] / all_) if np.isfinite(all_) and all_ > 0 else 0.0

    # One parameter after the other: the mildest change that lets the blocked stage itself pay more, and enough, else the
    # one after which it pays most.
    progress = re.search(r"^Success in the evaluations.*\n(.*)", text, re.MULTILINE)
    lately = re.findall(r": (\d+)%", progress[1])[-10:] if progress else []
    pays = PAYS_STUCK if lately and not any(map(int, lately)) else PAYS
    why, params = "no parameter is to blame: going on pays enough", {}
    if share({}) < pays:
        why = f"stage {blocked + 1} pays {share({}):.0%} of all there is to gain up to it, too little"
    while share(params) < pays and len(params) < CHANGED:
        best = []                                                 # of each factor's changes, the one after which it pays most
        for factor in FACTORS:
            tried = [{**params, name: float(f"{value * factor:.3g}")} for name, value in reward.params.items() if name not in params]
            pay_more = [change for change in tried if gains(change)[-1] > gains(params)[-1] + 1e-9]
            best += [max(pay_more, key=share)] if pay_more else []
        chosen = next((change for change in best if share(change) >= pays), max(best, key=share, default=params))
        if share(chosen) < min(pays, share(params) + 0.05):           # it hardly helps
            break
        params = chosen
    return scripted_analysis(why, params)


def scripted_analysis(why, params):
    answer = json.dumps({"blocked_by": why, "params": params})
    return f"Scripted failure analysis of the offline stand-in, not an LLM's.\n\n```json\n{answer}\n```"
