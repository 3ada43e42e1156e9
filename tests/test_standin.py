"""The scripted stand-in on descriptions written by hand, and the readings that its analyses try a reward out on."""

import json
import math
import re

import numpy as np
import pytest

import standin
from envs import COMPARE, TASKS, PandaEnv
from llm import LLMError, prompt, read_code
from reward import Reward
from standin import EQUAL, STAGES, StandIn, attempt_of, attempts_of, rank, score, scores_of
from test_envs import aim, gentle

# As questions.describe_attempt writes them.
TOUCHED = """ does not fulfil the task
  limit contact_force <= 2: kept
  limit block_displacement <= 0.05: kept
  hand_to_block <= 0.05: 12 of 50 steps, first at 1.95 s, longest run 11 from 1.95 s
  contact_force > 0.01: 4 of 50 steps, first at 2.20 s, longest run 3 from 2.35 s
  time 0.05 0.85 1.70 2.50 | lowest highest
  hand_to_block 0.16 0.1 0.05 0.034 | 0.032 0.17
  hand_above_block 0.05 0.01 -0.006 -0.02 | -0.021 0.06
  contact_force 0 0 0 0.1 | 0 0.25
"""
NEAR_STEPS, CONTACT_STEPS = (line.split(": ")[1] for line in TOUCHED.splitlines()[3:5])
FAR = (
    TOUCHED.replace(NEAR_STEPS, "0 of 50 steps")
    .replace(CONTACT_STEPS, "0 of 50 steps")
    .replace("0.034 | 0.032", "0.105 | 0.105")
)
ROUGH = (
    TOUCHED.replace("<= 2: kept", "<= 2: broken first at 2.30 s, in 2 steps, highest reading 5")
    .replace(NEAR_STEPS, f"{NEAR_STEPS}, 7 before a limit broke")
    .replace(CONTACT_STEPS, f"{CONTACT_STEPS}, 0 before a limit broke")
)
DONE = TOUCHED.replace("does not fulfil the task", "fulfils the task (done at 2.00 s)").replace(
    CONTACT_STEPS, "20 of 50 steps, first at 1.50 s, longest run 16 from 1.75 s"
)
LIFTED = """ does not fulfil the task
  hand_to_block <= 0.02: 30 of 50 steps, first at 1.00 s, longest run 30 from 1.00 s
  grip_force > 0: 9 of 50 steps, first at 1.30 s, longest run 9 from 1.30 s
  grip_force > 0 and block_height >= 0.08: 0 of 50 steps
  time 0.05 0.85 1.70 2.50 | lowest highest
  hand_to_block 0.13 0.02 0.01 0.01 | 0.01 0.13
  grip_force 0 0 3 0 | 0 3
  block_height 0 0 0.04 0 | 0 0.04
"""


def test_a_description_is_read_to_the_last_number():
    assert attempt_of(TOUCHED) == {
        "fulfils": False,
        "excess": None,
        "readings": {
            "hand_to_block": (0.16, 0.034, 0.032, 0.17),
            "hand_above_block": (0.05, -0.02, -0.021, 0.06),
            "contact_force": (0, 0.1, 0, 0.25),
        },
        "steps": {"hand_to_block <= 0.05": 12, "contact_force > 0.01": 4},
        "run": {"hand_to_block <= 0.05": 11, "contact_force > 0.01": 3},
    }
    rough = attempt_of(ROUGH)  # runs end where a limit breaks
    assert rough["run"] == {"hand_to_block <= 0.05": 7, "contact_force > 0.01": 0}
    assert (
        rough["steps"] == attempt_of(TOUCHED)["steps"]
        and rough["excess"] == 2.5
        and attempt_of(DONE)["fulfils"]
    )
    both = ROUGH.replace(
        "0.05: kept", "0.05: broken first at 0.05 s, in 9 steps, highest reading 0.2"
    )
    assert attempt_of(both)["excess"] == 4  # the worse of the two
    assert attempt_of(FAR)["run"] == {"hand_to_block <= 0.05": 0, "contact_force > 0.01": 0}
    conditions = [
        "hand_to_block <= 0.02",
        "grip_force > 0",
        "grip_force > 0 and block_height >= 0.08",
    ]
    assert list(attempt_of(LIFTED)["run"]) == conditions


@pytest.mark.parametrize(
    "line, excess",
    [
        ("<= 2: broken first at 2.30 s, in 2 steps, highest reading 5", 2.5),
        ("> 0.05: broken first at 1.00 s, in 3 steps, lowest reading 0.01", 1.04),
        ("< 0: broken first at 1.00 s, in 3 steps, highest reading 0.5", 1.5),
        ("> -1: broken first at 1.00 s, in 3 steps, lowest reading -1.5", 1.5),
    ],
)
def test_the_further_a_limit_is_broken_to_either_side_the_greater_the_excess(line, excess):
    assert attempt_of(TOUCHED.replace("<= 2: kept", line))["excess"] == pytest.approx(excess)


def test_attempts_end_where_the_next_begins_or_other_words_do():
    text = (
        f"Task: touch\n\nAttempt 7:{TOUCHED}\nAttempt 12:{FAR}  reward per step 1.5 = 1.5 (a)\n\n"
        "Rank them.\n  contact_force 9 9 | 9 9\n"
    )
    assert attempts_of(text) == {7: attempt_of(TOUCHED), 12: attempt_of(FAR)}
    assert attempts_of("Rank attempts such as\nthese") == {}


@pytest.mark.parametrize(
    "body, steps, expected",
    [
        (FAR, 10, 0.5),  # from 0.16 to 0.105 of the way to 0.05
        (
            FAR.replace("0.105 | 0.105", "0.05 | 0.05"),
            10,
            1.0,
        ),  # 0.0504, rounded: as good as reached
        (
            FAR.replace("hand_to_block 0.16", "hand_to_block 0.05"),
            10,
            0.0,
        ),  # began there and went away
        (TOUCHED, 10, 2.3),
        (TOUCHED, 2, 3.0),
        (TOUCHED, 3, 3.0),  # two stages, and three steps of those that success takes
        (DONE, 10, 5.2),  # two stages, kept up, 2 more, and 20 of 50 steps
        (DONE.replace("20 of 50", "50 of 50"), 10, 5.5),
        (ROUGH, 10, 0.2),
        (ROUGH.replace("reading 5", "reading 2.5"), 10, 0.4),
        (ROUGH.replace("reading 5", "reading 2"), 10, 0.5),
        (ROUGH.replace("0.034 | 0.032", "0.105 | 0.105"), 10, 0.1),
        (LIFTED, 5, 2.75),  # gripped, and half the height: three quarters of the last
        (
            LIFTED.replace("0 0.04\n", "0 0.08\n"),
            5,
            3.0,
        ),  # high enough, but not while it was gripped
        (
            LIFTED.replace(
                "9 of 50 steps, first at 1.30 s, longest run 9 from 1.30 s", "0 of 50 steps"
            ).replace("0 3 0 | 0 3", "0 0 0 | 0 0"),
            5,
            1.0,
        ),
    ],
)  # near only
def test_scores_are_those_of_the_words(body, steps, expected):
    assert score(attempt_of(body), steps) == pytest.approx(expected)


def test_later_stages_do_not_count_before_an_earlier_one_is_reached():
    # Contact for 3 of the 10 steps, though the hand never came within 0.05 m: half the way, and those steps.
    odd = TOUCHED.replace(NEAR_STEPS, "0 of 50 steps").replace("0.034 | 0.032", "0.105 | 0.105")
    assert score(attempt_of(odd), 10) == pytest.approx(0.5 + 0.3)


def test_success_takes_the_steps_that_the_goal_says():
    attempt = f"\n\nAttempt 4:{TOUCHED}"
    assert scores_of("Keep contact for 10 consecutive control steps (0.5 s)." + attempt)[
        4
    ] == pytest.approx(2.3)
    assert scores_of("Keep contact for 6 consecutive control steps (0.5 s)." + attempt)[
        4
    ] == pytest.approx(2.5)
    once = attempt.replace(
        "longest run 3", "longest run 1"
    )  # one step is enough where none are named
    assert scores_of("Touch the block." + once) == {4: pytest.approx(3.0)}
    for task in TASKS.values():
        assert re.search(rf"\b{task.steps} consecutive", task.goal)


def test_those_close_to_the_best_of_their_group_are_equal_and_no_others():
    # Shares 0.9, 0.85, 0.79, 0.72 of the way from 0.16 to 0.06: each is close to the next, but not to the next but one.
    lowest = {3: 0.088, 1: 0.07, 8: 0.075, 2: 0.081}
    far = FAR.replace("<= 0.05", "<= 0.06")
    answer = rank(
        "\n".join(
            f"Attempt {number}:" + far.replace("| 0.105", f"| {low}")
            for number, low in lowest.items()
        )
    )
    assert answer.splitlines()[-1] == "RANKING: 1 = 8 > 2 = 3"
    assert "not an LLM's" in answer
    for line in (
        "Attempt 1: progress 0.90",
        "Attempt 2: progress 0.79",
        "Attempt 3: progress 0.72",
        "Attempt 8: progress 0.85",
    ):
        assert answer.splitlines().count(line) == 1
    assert EQUAL == 0.1


def asked(text):
    return StandIn()([{"role": "user", "content": text}]).text


def test_the_kind_of_question_decides_the_answer():
    attempts = f"Attempt 1:{FAR}\nAttempt 2:{TOUCHED}"
    assert asked(prompt("rank", task="touch", goal="Touch it.", trajectories=attempts)).endswith(
        "\n\nRANKING: 2 > 1"
    )
    code = "def r(hand_to_block, w=1.0):\n    return {'a': -w * hand_to_block}"
    analysis = asked(prompt("analyse", task="touch", reward=code, trajectories=attempts))
    assert "RANKING" not in analysis and "not an LLM's" in analysis
    for task in TASKS:
        proposal = asked(prompt("propose", task=task))
        assert (
            "not an LLM's" in proposal and Reward(read_code(proposal), TASKS[task].features).params
        )
    # The numbers that the paper starts from.
    assert "contact_threshold=1.0" in asked(prompt("propose", task="touch"))
    assert "push_weight=2.0" in asked(prompt("propose", task="push"))


@pytest.mark.parametrize(
    "messages, words",
    [
        (
            [prompt("propose", task="push"), "an answer", "correct that"],
            "OPENAI_API_KEY or OPENAI_BASE_URL",
        ),
        ([prompt("rank", task="push"), "an answer"], "knows the questions in prompts/ only"),
        (["Write a reward."], "knows the questions in prompts/ only"),
        (["The Task: push"], "knows the questions in prompts/ only"),
        (["Task: juggle"], "no proposal for juggle: .*--proposal FILE"),
        ([prompt("rewrite", task="push")], "writes no code"),
        (
            [prompt("analyse", task="push", reward="def r(moon): return {}")],
            "cannot read the reward in the prompt: .*moon",
        ),
    ],
)
def test_what_the_stand_in_cannot_answer_it_says(messages, words):
    with pytest.raises(LLMError, match=words):
        StandIn()([{"role": "user", "content": text} for text in messages])


# A skill with readings so round that what each stage pays can be told by heart.
DIG = (dict(depth=0.0, load=0.0), dict(depth=1.0), dict(depth=2.0, load=1.0))
PIECES = """def r(depth, load, come={come}, fill={fill}):
    return {{"come": come * np.minimum(depth, 1), "fill": fill * load}}"""
LEAST = """def r(depth, load, least={least}):
    return {{"come": 1.0 * np.minimum(depth, 1), "fill": np.where(load > least, 1.0, 0.0)}}"""


@pytest.fixture
def dig(monkeypatch):
    """dig(code, *reached): the stand-in's analysis of attempts that meet so many of the two stages' conditions."""
    monkeypatch.setitem(STAGES, "dig", DIG)

    def run(code, *reached, progress="2,000: 0%, 3,000: 5%"):
        bodies = [
            f"Attempt {i + 1}: does not fulfil the task\n"
            + "".join(
                f"  {condition}: "
                + (
                    "5 of 50 steps, first at 0.05 s, longest run 5 from 0.05 s\n"
                    if count > stage
                    else "0 of 50 steps\n"
                )
                for stage, condition in enumerate(("depth >= 1", "load > 0"))
            )
            for i, count in enumerate(reached)
        ]
        answer = asked(
            prompt(
                "analyse",
                task="dig",
                reward=code,
                progress=progress,
                trajectories="\n".join(bodies),
            )
        )
        found = json.loads(re.search(r"```json\n(.*)\n```$", answer, re.DOTALL)[1])
        return found["blocked_by"], found["params"]

    return run


@pytest.mark.parametrize(
    "code, params, words",
    [
        (
            PIECES.format(come=1.0, fill=0.2),
            {"fill": 0.6},
            "stage 2 pays 17% of all there is to gain up to it, too little",
        ),
        (
            PIECES.format(come=1.0, fill=0.1),
            {"fill": 1.0},
            "stage 2 pays 9% of",
        ),  # threefold would not be enough
        (
            PIECES.format(come=1.0, fill=0.1234),
            {"fill": 1.23},
            "stage 2 pays 11% of",
        ),  # three digits are enough
        (
            PIECES.format(come=1.0, fill=0.02),
            {"fill": 0.2},
            "stage 2 pays 2% of",
        ),  # nothing is enough: what pays most
        (
            PIECES.format(come=1.0, fill=0.005),
            {},
            "stage 2 pays 0% of",
        ),  # nothing helps by more than a little
        (
            PIECES.format(come=7.0, fill=3.0),
            {},
            "no parameter is to blame: going on pays enough",
        ),  # just enough
        (PIECES.format(come=7.0, fill=2.99), {"fill": 8.97}, "stage 2 pays 30% of"),
        (LEAST.format(least=2.0), {"least": 0.6}, "stage 2 pays 0% of"),
        (LEAST.format(least=5.0), {"least": 0.5}, "stage 2 pays 0% of"),
        (LEAST.format(least=20.0), {}, "stage 2 pays 0% of"),
        # What punishes the next stage counts against it, and is lowered.
        (
            "def r(depth, load, w=1.0, cost=1.0): return {'a': w * np.minimum(depth, 1), 'b': -cost * load}",
            {"cost": 0.1},
            "stage 2 pays -50% of",
        ),
        ("def r(depth, load, w=1.0): return {'a': w * 0 * depth}", {}, "stage 2 pays 0% of"),
        (
            "def r(depth, load, w=1.0): return {'a': np.exp(1000 * load) + w}",
            {},
            "stage 2 pays 0% of",
        ),
    ],
)  # without bound
def test_an_analysis_takes_the_mildest_change_that_is_enough(code, params, words, dig):
    why, changes = dig(code, 1)
    assert changes == pytest.approx(params) and words in why


def test_several_parameters_change_where_one_is_not_enough(dig):
    code = """def r(depth, load, come=1.0, fill=0.02, pour=0.03, tip=0.01, wash=0.01):
    return {"come": come * np.minimum(depth, 1), "fill": fill * load, "pour": pour * load, "rest": (tip + wash) * load}"""
    assert dig(code, 1)[1] == {"pour": 0.3, "fill": 0.2}  # 0.52 of 1.52
    assert dig(code.replace("0.03", "0.01").replace("0.02", "0.01"), 1)[1] == {
        "fill": 0.1,
        "pour": 0.1,
        "tip": 0.1,
    }  # three at most


def test_what_only_the_end_of_the_way_pays_counts_half(dig):
    smooth, end = "fill * load", "fill * np.where(load > 0.9, 1.0, 0.0)"
    code = "def r(depth, load, fill=2.0): return {{'a': np.minimum(depth, 1), 'b': {}}}"
    assert dig(code.format(end).replace("2.0", "0.8"), 1)[0].startswith("stage 2 pays 29% of")
    assert dig(code.format(smooth).replace("2.0", "0.8"), 1)[1] == {}


def test_where_nothing_has_succeeded_of_late_the_next_stage_must_pay_as_much_as_all_before(dig):
    code, zeros = (
        PIECES.format(come=1.0, fill=0.9),
        ", ".join(f"{step},000: 0%" for step in range(11, 21)),
    )
    assert (
        dig(code, 1)[1] == dig(code, 1, progress=f"10,000: 0%, 11,000: 5%, {zeros[12:]}")[1] == {}
    )
    for progress in (zeros, f"10,000: 100%, {zeros}"):
        assert dig(code, 1, progress=progress) == (
            "stage 2 pays 47% of all there is to gain up to it, too little",
            {"fill": 2.7},
        )


def test_the_stage_that_is_blocked_is_the_first_that_fewer_than_half_of_the_attempts_reach(dig):
    code = "def r(depth, load, come=1.0, fill=0.1): return {'a': -come * np.minimum(depth, 1), 'b': fill * load}"
    for reached, stage in (
        ((), 1),
        ((0,), 1),
        ((1, 0, 0), 1),
        ((1, 0), 2),
        ((1, 2), 2),
        ((2, 2), 2),
        ((2, 0, 0), 1),
    ):
        assert f"stage {stage} " in dig(code, *reached)[0], reached


def readings(task):
    """Typical readings of a task at its start and at each stage, every feature named."""
    stage, all_ = {}, []
    for change in STAGES[task]:
        stage = {**stage, **change}
        all_.append(stage)
    return all_


def meets(features, conditions):
    return all(COMPARE[sign](features[name], value) for name, sign, value in conditions)


@pytest.mark.parametrize("task", STAGES)
def test_typical_readings_meet_the_conditions_of_their_stages_and_no_later_ones(task):
    stages = [(condition,) for condition in TASKS[task].stages] + [TASKS[task].success]
    assert len(readings(task)) == len(stages) + 1  # and the start
    for place, features in enumerate(readings(task)):
        assert list(features) == list(TASKS[task].features)
        assert [meets(features, conditions) for conditions in stages] == [
            k < place for k in range(len(stages))
        ]
        assert not any(meets(features, [limit]) for limit in TASKS[task].limits)
        assert all(
            feature.low <= features[name] <= feature.high
            for name, feature in TASKS[task].features.items()
        )


@pytest.mark.parametrize("task", STAGES)
def test_typical_readings_fit_together(task):
    start, *_, success = readings(task)
    for features in readings(task):
        beside, above = features["hand_beside_block"], features["hand_above_block"]
        assert features["hand_to_block"] == pytest.approx(math.hypot(beside, above), rel=0.1)
        # The block's centre is 0.02 m above its underside.
        assert features["hand_height"] == pytest.approx(
            0.02 + features.get("block_height", 0) + above, abs=1e-3
        )
        if features["contact_force"] and task != "grasp":
            assert (
                0.03 <= features["hand_to_block"] <= 0.04
            )  # closed fingers touch the block's side
        if features.get("grip_force"):
            assert features["contact_force"] == pytest.approx(2 * features["grip_force"])
            assert features["gripper_opening"] == pytest.approx(0.04, abs=0.005)
    for name in (
        "contact_force",
        "grip_force",
        "block_height",
        "block_displacement",
        "block_speed",
    ):
        assert start.get(name, 0) == 0  # nothing has been touched yet
    if "block_to_goal" in start:
        assert success["block_displacement"] == pytest.approx(
            start["block_to_goal"] - success["block_to_goal"]
        )


def grasping(env, t):
    if t < 22:
        return [*aim(env, (*env._block_position[:2], 0.10 if t < 10 else 0.025)), 1]
    return [0, 0, 0 if t < 28 else 1, -1]


def pushing(env, t):
    block, ahead = env._block_position[:2], env._goal - env._block_position[:2]
    if np.linalg.norm(ahead) < 0.015:
        return [0, 0, 0, 0]
    return [*aim(env, (*(block + 0.01 * ahead / np.linalg.norm(ahead)), 0.03), 20), 0]


@pytest.mark.parametrize(
    "task, policy", [("touch", gentle), ("grasp", grasping), ("push", pushing)]
)
def test_typical_readings_are_about_those_of_a_robot_that_does_the_task(task, policy):
    env = PandaEnv(task)
    stages = [(condition,) for condition in TASKS[task].stages] + [TASKS[task].success]
    seen = [[] for _ in range(len(stages) + 1)]
    for seed in range(6):
        env.reset(seed=seed)
        for t in range(50):
            features = env.step(policy(env, t))[-1]["features"]
            reached = next(
                (k for k, conditions in enumerate(stages) if not meets(features, conditions)),
                len(stages),
            )
            seen[reached].append(list(features.values()))
    env.close()
    # Lengths within 15 mm (the block's way sideways within 3 cm), speeds within 0.07 m/s, forces within 0.05 N.
    near = {"m": 0.015, "m/s": 0.07, "N": 0.05, "": 0.0}
    for typical, real in zip(readings(task), seen):
        assert len(real) > 20
        for (name, value), low, high in zip(
            typical.items(), np.min(real, axis=0), np.max(real, axis=0)
        ):
            margin = 0.03 if name == "block_displacement" else near[TASKS[task].features[name].unit]
            assert low - margin <= value <= high + margin, name


def test_other_tasks_are_ranked_but_not_analysed():
    assert asked(f"Task: juggle\n\nRANKING:\n\nAttempt 1:{FAR}\nAttempt 2:{TOUCHED}").endswith(
        "RANKING: 2 > 1"
    )
    answer = asked('Task: juggle\n"blocked_by"')
    assert (
        '"params": {}' in answer
        and "touch, grasp and push only" in answer
        and set(standin.STAGES) == set(TASKS)
    )
