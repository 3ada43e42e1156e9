"""NOT a language model: a scripted stand-in, so that the loop runs without a key or a network.

    from llm import LLM
    from standin import StandIn

    llm = LLM(StandIn())

It answers from the prompt's text alone. Its rankings follow B-Pref's scripted teachers (Lee et al.,
2021) and work for any task: beside each attempt, the prompt gives a progress score, which a
language model does not get. Its proposals for touch, grasp and push are in prompts/offline/, with
the first numbers that the paper reports. Its failure analyses change nothing.
"""

import re
from pathlib import Path

import numpy as np

from envs import COMPARE
from llm import PROMPTS, LLMError, Reply, in_a_row

SIGNATURE = "Scripted preferences, not an LLM's."
EQUAL = 0.1  # scores this close to the best of their group are equal to it


class StandIn:
    """A backend of `llm.LLM`. Raises LLMError for questions that it does not know."""

    words = "offline stand-in: scripted answers, NOT a language model"

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
    found = re.findall(r"(?ms)^Attempt (\d+):$.*?^progress (\S+)$", text)
    if not found:
        raise LLMError(
            "the offline stand-in ranks by the lines of `progress` alone; there are none"
        )
    scores = {label: float(progress) for label, progress in found}
    ranking, best = "", np.inf
    for label in sorted(scores, key=scores.get, reverse=True):
        equal = best - scores[label] < EQUAL
        ranking += f" = {label}" if equal else f" > {label}"
        best = best if equal else scores[label]
    return f"{SIGNATURE}\n\nRANKING: {ranking[3:]}"


def progress(llm, task, trajectories) -> list[str] | None:
    """A line with the score of each trajectory, (T, F). None for an `llm` that is no stand-in."""
    scripted = isinstance(llm.backend, StandIn)
    if llm.replay:  # then the transcript answers, not the backend
        scripted = SIGNATURE in Path(llm.replay).read_text(encoding="utf-8", errors="replace")
    return [f"progress {score(task, tau):.3f}" for tau in trajectories] if scripted else None


def score(task, tau: np.ndarray) -> float:
    """How far a trajectory gets: 1 per stage reached, and up to 1 for how long the last one lasts.

    The last stage is the task's success. A stage that is not reached counts by the share of the way
    to it, and ends the count. Success adds 2, and up to 0.5 for lasting. An attempt that breaks a
    limit stays below all that come near without breaking one.
    """
    readings, excess = dict(zip(task.features, tau.T, strict=True)), 0.0
    for name, sign, limit in task.limits:
        broken = readings[name][COMPARE[sign](readings[name], limit)]
        excess = max([excess, *(1 + np.abs(broken - limit) / (abs(limit) or 1.0))])
    stages = [*([stage] for stage in task.stages), task.success]
    if excess:
        return 0.5 * way(readings, stages[0][0]) / excess
    held = [
        np.all([COMPARE[sign](readings[name], value) for name, sign, value in stage], axis=0)
        for stage in stages
    ]
    longest = in_a_row(held[-1]).max()
    success = longest >= task.steps
    total = min(longest, task.steps) / task.steps
    for stage, reached in zip(stages, held):
        if not reached.any() and not success:
            total += np.mean([way(readings, condition) for condition in stage])
            break
        total += 1.0
    return float(total + success * (2 + 0.5 * held[-1].mean()))


def way(readings: dict, condition: tuple) -> float:
    """The share of the way from an attempt's first reading to a condition that it went."""
    name, sign, value = condition
    x = readings[name]
    best = x.min() if sign == "<=" else x.max()
    if COMPARE[sign](best, value):
        return 1.0
    return (best - x[0]) / (value - x[0]) if value != x[0] else 0.0
