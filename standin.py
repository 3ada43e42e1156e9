"""NOT a language model: a scripted stand-in, so that the loop runs without a key or a network.

    from llm import LLM
    from standin import StandIn

    llm = LLM(StandIn())

It answers from the prompt's text alone. Its rankings follow B-Pref's scripted teachers (Lee et al.,
2021) and work for any task: each attempt gets a progress score from its description, and scores
within EQUAL are equal. Its proposals for touch, grasp and push are in prompts/offline/, with the
first numbers that the paper reports. Its failure analyses change nothing.
"""

import re

import numpy as np

from llm import PROMPTS, LLMError, Reply

EQUAL = 0.1  # scores this close to the best of their group are equal to it
REACHES = {"<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


class StandIn:
    """A backend of `llm.LLM`. Raises LLMError for questions that it does not know."""

    def __call__(self, messages: list[dict]) -> Reply:
        text = messages[0]["content"]
        task = re.search(r"^Task: (\w+)", text, re.MULTILINE)
        if len(messages) > 1 or not task:
            raise LLMError(
                "the offline stand-in only knows the questions in prompts/: set OPENAI_API_KEY or "
                "OPENAI_BASE_URL to ask a language model"
            )
        if '"blocked_by"' in text:
            return Reply('The stand-in is no LLM. {"blocked_by": "unknown to it", "params": {}}')
        if "RANKING:" in text:
            return Reply(rank(text))
        proposal = PROMPTS / "offline" / f"{task[1]}.txt"
        if not proposal.exists():
            raise LLMError(
                f"the offline stand-in has no first reward for {task[1]}: give one with --proposal "
                "FILE, or set OPENAI_API_KEY or OPENAI_BASE_URL to ask a language model"
            )
        return Reply(proposal.read_text(encoding="utf-8"))


def rank(text: str) -> str:
    """The answer to prompts/rank.txt: attempts by score, best first."""
    consecutive = re.search(r"(\d+) consecutive", text)
    steps = int(consecutive[1]) if consecutive else 1
    scores = {label: score(attempt, steps) for label, attempt in read_attempts(text).items()}
    ranking, best = "", np.inf
    for label in sorted(scores, key=scores.get, reverse=True):
        equal = best - scores[label] < EQUAL
        ranking += f" = {label}" if equal else f" > {label}"
        best = best if equal else scores[label]
    listed = "\n".join(f"Attempt {label}: progress {s:.2f}" for label, s in scores.items())
    return f"Scripted preferences, not an LLM's.\n{listed}\n\nRANKING: {ranking[3:]}"


def read_attempts(text: str) -> dict[int, dict]:
    """What the descriptions in a prompt say, by the attempts' labels."""
    pattern = r"^Attempt (\d+):(.*?)(?=^Attempt \d+:|^\S|\Z)"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return {int(label): read_attempt(body) for label, body in found}


def read_attempt(body: str) -> dict:
    """One description.

    fulfils: bool. readings: (first, lowest, highest) by feature. steps, run: by condition, the
    share of steps in which it held, and its longest run. excess: the worst reading of a limit as a
    multiple of it; 0 if all were kept.
    """
    readings, steps, run, excess = {}, {}, {}, [0.0]
    for name, first, low, high in re.findall(
        r"^ +(\w+) (-?[\d.]\S*) .*\| (-?[\d.]\S*) (-?[\d.]\S*)$", body, re.MULTILINE
    ):
        readings[name] = float(first), float(low), float(high)
    for condition, held, rest in re.findall(
        r"^ +(\w+ [<>]=? .*?): (\d+ of \d+) steps(.*)$", body, re.MULTILINE
    ):
        longest = re.search(r"longest run (\d+)", rest)
        steps[condition] = int(held.split()[0]) / int(held.split()[-1])
        run[condition] = int(longest[1]) if longest else 0
    for limit, worst in re.findall(
        r"^ +limit \w+ [<>]=? (\S+): broken .* (?:highest|lowest) reading (\S+)$",
        body,
        re.MULTILINE,
    ):
        limit, worst = float(limit), float(worst)
        excess.append(worst / limit if worst > limit > 0 else 1 + abs(worst - limit))
    fulfils = " fulfils the task" in body.split("\n")[0]
    attempt = {"fulfils": fulfils, "readings": readings, "steps": steps, "run": run}
    return {**attempt, "excess": max(excess)}


def score(attempt: dict, steps: int) -> float:
    """How far an attempt gets: 1 for each stage reached, and up to 1 for staying in the last one.

    A stage that is not reached counts by the share of the way to it, and ends the count. Success
    adds 2, and up to 0.5 for lasting. An attempt that breaks a limit stays below all that come near
    without breaking one.
    """
    stages = {stage: stage.split(" and ") for stage in attempt["run"]}
    first, goal = list(stages)[0], list(stages)[-1]
    if attempt["excess"]:
        return 0.5 * way(attempt["readings"], stages[first][0]) / attempt["excess"]
    total = min(attempt["run"][goal], steps) / steps
    for stage, conditions in stages.items():
        if not attempt["run"][stage] and not attempt["fulfils"]:
            total += np.mean([way(attempt["readings"], condition) for condition in conditions])
            break
        total += 1.0
    return float(total + attempt["fulfils"] * (2 + 0.5 * attempt["steps"][goal]))


def way(readings: dict, condition: str) -> float:
    """The share of the way from an attempt's first reading to a condition that it went."""
    name, sign, value = condition.split(" ")
    value, (first, low, high) = float(value), readings[name]
    best = low if sign == "<=" else high
    if REACHES[sign](best, value):
        return 1.0
    return (best - first) / (value - first) if value != first else 0.0
