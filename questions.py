"""What the LLM is asked, in words: to write a reward, to rank attempts, to say what blocks a skill.

The wording stands in prompts/; here its placeholders are filled in, from a `Task` (see envs.py) or anything with its fields.
"""

import math
from pathlib import Path

import numpy as np

from llm import LLM, LLMError, prompt, read_analysis, read_code, read_ranking
from reward import FUNCTIONS, Reward

ANALYSED = 12     # attempts that a failure analysis, or who rewrites a reward, is shown


def propose_reward(llm: LLM, task, features: np.ndarray, path: str | None = None) -> Reward:
    """The LLM's reward for `task`; what does not parse, run or stay finite on `features`, (N, F), goes back to it.

    path: a file that holds a reward (Python, or Markdown with a code block), which is taken instead of asking.
    Raises LLMError for a file that cannot be used, and where the LLM gives nothing that can.
    """
    def parse(text):
        return read_reward(text, task, features)

    if path:
        try:
            return parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LLMError(f"--proposal {path} cannot be used: {error}") from None
    return llm.ask("propose", prompt("propose", **task_words(task), rules=rules()), parse)


def rules(tuned: bool = True) -> str:
    """The language of rewards, for the prompts that ask for one. tuned: whether the parameters will be estimated."""
    return prompt("rules", few=", better 5 to 8, for each is estimated from few data: those that you are least\n  sure of" if tuned else "",
                  functions=", ".join(f"np.{name}" for name in FUNCTIONS))


def rank_attempts(llm: LLM, task, trajectories: list[np.ndarray]) -> list[list[int]]:
    """The LLM's ranking of trajectories, (T, F) arrays: groups of equally good indices, best first.

    Where the LLM fails, the screen says why and the ranking is empty: training can go on without it.
    """
    question = prompt("rank", **task_words(task), count=len(trajectories), trajectories=describe(task, trajectories))
    try:
        groups = llm.ask("rank", question, lambda text: read_ranking(text, len(trajectories)))
    except LLMError as error:
        print(f"\n  No new θ; training goes on with the one it has.\n  {error}\n", flush=True)
        return []
    return [[label - 1 for label in group] for group in groups]


def analyse_failure(llm: LLM, task, reward: Reward, trajectories: list[np.ndarray], wrong: float, stalled: bool,
                    changes: list, evaluations: list[tuple[int, float]]) -> tuple[str, dict[str, float]]:
    """(what blocks the skill, new values of some parameters, none if none is to blame), by the LLM.

    wrong: share of the LLM's pairs that R_θ orders otherwise. stalled: whether the robot has stopped getting better.
    changes: of θ so far, with `step`, `cause` and `theta`. evaluations: (step, success rate). Raises LLMError.
    """
    theta, R = changes[-1].theta, reward.returns(trajectories)
    question = prompt("analyse", **task_words(task), **reward_words(task, reward, theta, trajectories, np.argsort(-R(theta)), wrong, evaluations),
                      fails="does not succeed reliably and has stopped\ngetting better" if stalled else "has not succeeded once of late",
                      history="\n".join(f"- {change.step:,} steps, {change.cause}: "
                                        + ", ".join(f"{name}={value:.3g}" for name, value in change.theta.items())
                                        for change in changes))

    def parse(text):
        blocked_by, params = read_analysis(text, theta)
        if not np.isfinite(R({**theta, **params})).all():
            raise ValueError("with these values the reward is not finite on the attempts: choose others")
        return blocked_by, params

    return llm.ask("analyse", question, parse)


def rewrite_reward(llm: LLM, task, reward: Reward, trajectories: list[np.ndarray], ranking: list[list[int]], wrong: float,
                   changes: list, evaluations: list[tuple[int, float]]) -> Reward:
    """The LLM's reward in place of `reward`, other code and other parameters, after a ranking.

    So do Eureka (Ma et al., 2023) and ICPL (Yu et al., 2024), in which nothing but the LLM tunes a number. ranking: groups of equally
    good indices of `trajectories`, best first. wrong, changes, evaluations: as in `analyse_failure`. Raises LLMError.
    """
    taken_back = [then.source for then, after in zip(changes, changes[1:]) if after.cause == "undone"]
    question = prompt("rewrite", **task_words(task), rules=rules(tuned=False), count=len(trajectories),
                      **reward_words(task, reward, changes[-1].theta, trajectories, np.concatenate(ranking), wrong, evaluations),
                      undone="".join("\nThis one was tried before and taken back, because the robot did worse with it than with the one before it:\n\n"
                                     f"```python\n{source.strip()}\n```\n" for source in taken_back))
    return llm.ask("rewrite", question, lambda text: read_reward(text, task, np.concatenate(trajectories)))


def read_reward(text: str, task, features) -> Reward:
    """The reward in an answer, tried on `features`, (N, F). Raises ValueError where it cannot be used."""
    reward = Reward(read_code(text), task.features)
    reward.check(reward.named(features))
    return reward


def reward_words(task, reward, theta, trajectories, order, wrong, evaluations) -> dict[str, str]:
    """What prompts about a reward in use say of it, of its success and of ANALYSED of the trajectories, evenly chosen in that order."""
    shown = [trajectories[i] for i in order[np.unique(np.linspace(0, len(order) - 1, ANALYSED).round().astype(int))]]
    return dict(reward=reward.source_with(theta).strip(), wrong=f"{wrong:.0%}", shown=len(shown),
                progress=", ".join(f"{step:,}: {success:.0%}" for step, success in evaluations),
                trajectories=describe(task, shown, [reward_note(reward, theta, trajectory) for trajectory in shown])
                              + strange_note(reward))


def strange_note(reward: Reward) -> str:
    """Which terms have left the bounds in training, if any has."""
    values = ", ".join(f"{name} = {value:.4g}" for name, value in reward.strange.items())
    return values and f"\n\nIn some steps of training, terms were far too large or no numbers at all, and were cut off: {values}"


def reward_note(reward, theta, trajectory):
    """What r_θ pays per step of a trajectory, and for what."""
    per_step, terms = reward.returns([trajectory])(theta)[0] / len(trajectory), reward.terms(reward.named(trajectory), theta)
    return f"reward per step {per_step:.3g} = " + " + ".join(f"{term.mean():.3g} ({name})" for name, term in terms.items())


def task_words(task) -> dict[str, str]:
    """What every prompt says of `task`: the values of its placeholders."""
    features = "\n".join(f"- {name} [{f.unit or 'no unit'}, mostly {f.low:g} to {f.high:g}]: {f.text}"
                         for name, f in task.features.items())
    return dict(
        task=task.name, goal=task.goal, robot=task.robot, details=task.details, features=features,
        rate=f"{1 / task.dt:g}", horizon=f"{task.horizon} steps ({task.horizon * task.dt:g} s)", steps=task.horizon,
        discount=task.discount, limits=" and no limit is broken at any time of it, before or after" if task.limits else "",
        forbidden="What must it not do, and how is that punished without making it give up?" if task.limits else
                  "Nothing is forbidden here. Is there still something to discourage, without making it give up?",
        breaking="One that breaks a limit cannot succeed any more: put it below those that get as far without breaking "
                 "it, the lower the sooner and the further it is broken." if task.limits else "")


def describe(task, trajectories, notes=None) -> str:
    """Trajectories as text, numbered from 1 in the order given, each followed by its note."""
    texts = [describe_attempt(i + 1, dict(zip(task.features, trajectory.T)), task) for i, trajectory in enumerate(trajectories)]
    return "\n\n".join(f"{text}\n  {note}" if note else text for text, note in zip(texts, notes or [""] * len(texts)))


def describe_attempt(label: int, series: dict[str, np.ndarray], task) -> str:
    """One trajectory as text for a prompt, below 400 tokens: whether it fulfils the task, limits, stages, key moments.

    series: (T,) arrays by name. The task is fulfilled where all conditions of `task.success` hold for `task.steps` steps
    running and none of `task.limits` ever holds.
    """
    length = len(next(iter(series.values())))

    def short(value, name):
        span = max(1e-9, task.features[name].high - task.features[name].low)
        return f"{round(float(value), max(3, 1 - math.floor(math.log10(span)))) + 0.0:.3g}"     # finer where readings are small

    def time_of(step):
        return f"{(step + 1) * task.dt:.2f}"

    def met(condition):
        name, sign, value = condition
        return {">": np.greater, ">=": np.greater_equal, "<=": np.less_equal}[sign](series[name], value)

    def words(conditions):
        return " and ".join(f"{name} {sign} {value:g}" for name, sign, value in conditions)

    kept = {">": "<=", ">=": "<", "<=": ">"}           # what a limit asks for, by the condition that breaks it

    breaks = {condition: np.flatnonzero(met(condition)) for condition in task.limits}
    first_break = min((int(steps[0]) for steps in breaks.values() if len(steps)), default=length)
    holds = np.logical_and.reduce([met(condition) for condition in task.success])
    done = next((step for step in range(task.steps - 1, length) if holds[step + 1 - task.steps:step + 1].all()), None)
    verdict = "fulfils the task" if done is not None and first_break == length else "does not fulfil the task"
    lines = [f"Attempt {label}: {verdict}"]
    if done is not None:
        lines[0] += f" ({'done' if first_break == length else 'done but for the limits'} at {time_of(done)} s)"
    for (name, sign, value), steps in breaks.items():
        worst = f"lowest reading {series[name].min():.4g}" if sign == "<=" else f"highest reading {series[name].max():.4g}"
        lines.append(f"  limit {name} {kept[sign]} {value:g}: " + (
            f"broken first at {time_of(steps[0])} s, in {len(steps)} steps, {worst}" if len(steps) else "kept"))
    for conditions in [(condition,) for condition in task.stages] + [task.success]:
        held = np.logical_and.reduce([met(condition) for condition in conditions])
        run, end = longest_run(held)
        spell = (f", first at {time_of(int(held.argmax()))} s, longest run {run} "
                 f"from {time_of(end - run + 1)} s" if run else "")
        if run and first_break < length:
            spell += f", {longest_run(held[:first_break])[0]} before a limit broke"
        lines.append(f"  {words(conditions)}: {int(held.sum())} of {length} steps{spell}")
    moments = np.unique(np.linspace(0, length - 1, 4).round().astype(int))
    rows = [["time", *(time_of(step) for step in moments), "| lowest", "highest"]]
    for name, values in series.items():
        rows.append([name, *(short(values[step], name) for step in moments), f"| {short(values.min(), name)}", short(values.max(), name)])
    return "\n".join(lines + ["  " + " ".join(row) for row in rows])


def longest_run(met):
    """(length, index of its last step) of the longest run of True in a (T,) array."""
    best, end, run = 0, -1, 0
    for step, true in enumerate(met):
        run = run + 1 if true else 0
        if run > best:
            best, end = run, step
    return best, end
