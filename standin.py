"""NOT a language model: a scripted stand-in for one, so that the whole loop runs without a key and without network.

    llm = LLM(StandIn(), record=print)

It answers from the prompt's text alone, for the three tasks that it knows. Proposals are written out beforehand in
prompts/offline/, with the first numbers that the paper reports (contact threshold 1 N, push weight 2.0). Preferences
follow B-Pref's scripted teachers (Lee et al., 2021): a progress score for each attempt, read off its description, and
equal preference where a score is within EQUAL of the best of its group. Failure analyses try out the reward in the prompt, whoever wrote
it, on typical readings of each stage.
"""

import json
import re

import numpy as np

from llm import PROMPTS, LLMError, Reply, prompt, read_code
from reward import Reward, RewardError

EQUAL = 0.1             # progress scores this close to the best of their group are equal to it
FACTORS = (3.0, 10.0, 0.3, 0.1)   # by which an analysis may change a parameter, in order of preference
PAYS = 0.3              # share of all there is to gain up to the next stage which that stage should pay at least

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
        if len(messages) > 1 or not task or task[1] not in STAGES:
            raise LLMError("the offline stand-in knows the prompts of touch, grasp and push only; set OPENAI_API_KEY "
                           "or OPENAI_BASE_URL to ask a real LLM")
        if '"blocked_by"' in text:
            return Reply(analyse(task[1], text))
        if "RANKING:" in text:
            return Reply(rank(task[1], text))
        if not (PROMPTS / "offline" / f"{task[1]}.txt").exists():
            raise LLMError(f"there is no proposal for {task[1]} in {PROMPTS / 'offline'}")
        return Reply(prompt(f"offline/{task[1]}"))


def attempts_of(text):
    """What the descriptions in a prompt say: {number: attempt}, see `attempt_of`."""
    bodies = re.findall(r"^Attempt (\d+):(.*?)(?=^Attempt \d+:|^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return {int(number): attempt_of(body) for number, body in bodies}


def attempt_of(body):
    """One description as a dict: `fulfils`; `readings`, (first, last, lowest, highest) by feature; `steps` and `run` by
    condition, in how many steps it held and its longest run before a limit broke; `excess`, the worst reading over its
    limit, None where all were kept."""
    readings = {}
    for name, row in re.findall(r"^ +(\w+) (-?[\d.]+ .*\| [-\d].*)$", body, re.MULTILINE):
        moments, extremes = row.split("|")
        readings[name] = (float(moments.split()[0]), float(moments.split()[-1]), *map(float, extremes.split()))
    steps, run = {}, {}
    for condition, held, rest in re.findall(r"^ +(\w+ [<>]=? .*?): (\d+) of \d+ steps(.*)$", body, re.MULTILINE):
        runs = re.findall(r"longest run (\d+)|, (\d+) before a limit broke", rest)
        steps[condition], run[condition] = int(held), int("".join(runs[-1])) if runs else 0
    excess = [float(most) / float(limit) for limit, most in
              re.findall(r"^ +limit \w+ <= ([\d.]+): broken .* highest reading ([\d.]+)$", body, re.MULTILINE)]
    return {"fulfils": " fulfils the task" in body.split("\n")[0], "readings": readings, "steps": steps, "run": run,
            "excess": max(excess, default=None)}


def score(task, attempt):
    """How far an attempt gets: about 1 for each stage; less for limits; 2 for fulfilling the task and more for keeping it up."""
    readings, run, steps = attempt["readings"], attempt["run"], attempt["steps"]
    first, last, low, high = range(4)
    goal = list(run)[-1]                                          # the condition of success is the last one listed
    total = np.clip((0.15 - readings["hand_to_block"][low]) / 0.12, 0, 1)
    if task == "touch":
        total += 2 * min(run[goal], 10) / 10
    elif task == "grasp":
        around = readings["hand_to_block"][low] < 0.03            # fingers on top of the block press it, too
        held = around * min(run["grip_force > 0"], 5) / 5
        total += held + held * min(readings["block_height"][high], 0.08) / 0.08 + min(run[goal], 5) / 5
    else:
        distance = readings["block_to_goal"]
        total += 2 * (distance[first] - distance[last]) / max(distance[first], 0.01) + min(run[goal], 3) / 3
    if attempt["excess"]:                                         # rough contact is worse than none
        total = 0.5 * np.clip((0.15 - readings["hand_to_block"][low]) / 0.12, 0, 1) / attempt["excess"]
    return float(total + attempt["fulfils"] * (2 + 0.5 * steps[goal] / 50))


def rank(task, text):
    """The answer to prompts/rank.txt: attempts by score, those closer than EQUAL to the best of their group equal."""
    scores = {number: score(task, attempt) for number, attempt in attempts_of(text).items()}
    ranking, best = "", None
    for number in sorted(scores, key=scores.get, reverse=True):
        equal = best is not None and best - scores[number] < EQUAL
        ranking += f" = {number}" if equal else f" > {number}"
        best = best if equal else scores[number]
    listed = "\n".join(f"Attempt {number}: progress {value:.2f}" for number, value in scores.items())
    return f"Scripted preferences of the offline stand-in, not an LLM's.\n{listed}\n\nRANKING: {ranking[3:]}"


def analyse(task, text):
    """The answer to prompts/analyse.txt: the one change of a parameter after which the blocked stage pays best."""
    try:
        reward = Reward(read_code(text), list(STAGES[task][0]))
    except (RewardError, ValueError) as error:
        raise LLMError(f"the offline stand-in cannot read the reward in the prompt: {error}") from None
    stage, stages = {}, []
    for change in STAGES[task]:
        stage = {**stage, **change}
        stages.append(stage)
    features = {name: np.array([stage[name] for stage in stages]) for name in stages[0]}

    # The stage that is blocked: the one after the last whose condition at least half of the attempts meet.
    met = [list(attempt["steps"].values()) for attempt in attempts_of(text).values()]
    reached = [k for k in range(len(stages) - 1) if met and np.mean([steps[k] > 0 for steps in met]) >= 0.5]
    blocked = min(max(reached, default=-1) + 1, len(stages) - 2)

    def share(params):
        """What the blocked stage pays more than the one before, as a share of all gains and losses up to it."""
        gains = np.diff(reward.total(features, params))[:blocked + 1]
        return float(gains[-1] / np.abs(gains).sum()) if np.isfinite(gains).all() and gains.any() else 0.0

    now = share(reward.params)
    tried = {(name, factor): share({**reward.params, name: value * factor})
             for factor in FACTORS for name, value in reward.params.items()}
    name, factor = max(tried, key=tried.get)
    why, params = "no parameter is to blame: going on pays enough", {}
    if now < PAYS:
        why = f"stage {blocked + 1} pays {now:.0%} of all there is to gain up to it, too little"
        if tried[name, factor] > now + 0.05:
            params = {name: float(f"{reward.params[name] * factor:.3g}")}
    answer = json.dumps({"blocked_by": why, "params": params})
    return f"Scripted failure analysis of the offline stand-in, not an LLM's.\n\n```json\n{answer}\n```"
