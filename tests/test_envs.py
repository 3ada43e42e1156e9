"""Physics against what the tasks promise, and Gymnasium's contract."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from envs import BLOCK_FRICTION, BLOCK_MASS, EPISODE_STEPS, FEATURES, FINGER_FORCE, FINGER_MAX, HAND, TASKS, WORKSPACE, PandaEnv
from questions import task_words


@pytest.fixture(params=list(TASKS))
def env(request):
    env = PandaEnv(request.param)
    yield env
    env.close()


def rollout(env, actions, **reset):
    """Everything an episode shows, as bytes."""
    obs, info = env.reset(**reset)
    trace = [obs.tobytes(), repr(info)]
    for action in actions:
        obs, *rest = env.step(action)
        trace += [obs.tobytes(), repr(rest)]
    return trace


def test_same_seed_and_actions_are_bit_identical(env):
    rng = np.random.default_rng(0)
    episodes = [rng.uniform(-1, 1, (EPISODE_STEPS, 4)) - (0, 0, 0.3, 0) for _ in range(3)]
    fresh = []
    for seed, actions in enumerate(episodes):
        alone = PandaEnv(env.task)
        fresh.append(rollout(alone, actions, seed=seed))
        alone.close()
    other = PandaEnv(env.task)
    other.reset(seed=9)
    for seed in (2, 0, 1, 0):
        rollout(env, episodes[1][:17], seed=5)                     # left in mid-episode
        other.step(episodes[0][0])
        assert rollout(env, episodes[seed], seed=seed) == fresh[seed]
    other.close()


def test_starts_are_drawn_afresh_and_stay_in_bounds(env):
    blocks = set()
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        blocks.add(tuple(env._block_position))
        assert obs.shape == env.observation_space.shape and obs.dtype == np.float32
        assert not info["success"] and info["features"]["block_displacement"] < 1e-6
        assert math.dist(env._hand, env._target) < 2e-3            # inverse kinematics arrived
    assert len(blocks) == 20


def test_features_are_documented_and_true(env):
    env.reset(seed=3)
    text = task_words(env.task)["features"]
    rng = np.random.default_rng(0)
    for _ in range(EPISODE_STEPS):
        _, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 4))
        f = info["features"]
        assert list(f) == list(env.task.features) == list(TASKS[env.task.name].features)
        assert all(name in text and type(value) is float and math.isfinite(value) for name, value in f.items())
        apart = env._hand - env._block_position
        assert f["hand_to_block"] == pytest.approx(np.linalg.norm(apart))
        assert f["hand_beside_block"] == pytest.approx(np.linalg.norm(apart[:2]))
        assert f["hand_above_block"] == pytest.approx(apart[2])
        assert not terminated and reward in (0.0, 1.0)
    assert truncated
    assert all(feature.text and feature.low < feature.high for feature in FEATURES.values())
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))


@pytest.mark.parametrize("task", ["touch", "grasp"])
def test_without_a_goal_of_its_own_a_task_has_it_where_the_block_starts(task):
    env = PandaEnv(task)
    for options in (None, {"block": (0.5, 0.05)}):
        obs, _ = env.reset(seed=0, options=options)
        np.testing.assert_array_equal(obs[8:10], 0)                    # goal minus block
    assert env.reset(seed=0, options={"block": (0.5, 0.05), "goal": (0.5, 0.1)})[0][8:10] == pytest.approx([0, 1.0], abs=1e-5)
    env.close()


def test_bad_arguments_name_the_cure(env):
    with pytest.raises(ValueError, match="touch, grasp, push"):
        PandaEnv("fly")
    with pytest.raises(ValueError, match="state or pixels"):
        PandaEnv("touch", obs="sound")
    with pytest.raises(ValueError, match="hand, block, goal"):
        env.reset(options={"sun": (0, 0)})
    env.reset(seed=0)
    for action in ([0, 0, 0], [0, 0, 0, math.nan], [[0, 0, 0, 0]]):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)


def test_a_task_whose_parts_contradict_each_other_is_refused():
    push = TASKS["push"]
    for parts, words in ((dict(success=(("block_height", ">", 0.1),)), "'block_height' '>'; it takes one of its features .hand_to_block"),
                         (dict(limits=(("hand_speed", "==", 0.1),)), "one of >, >=, <="), (dict(stages=(("wind", ">", 1),)), "'wind'"),
                         (dict(steps=4), "push: success takes 4 steps running, and its goal does not say \"4 consecutive\"")):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(push, **parts)
    with pytest.raises(ValueError, match="lasts 0.05 s, not 0.1 s"):
        PandaEnv(dataclasses.replace(push, dt=0.1))


def test_an_episode_lasts_as_long_as_its_task_says():
    env = PandaEnv(dataclasses.replace(TASKS["push"], horizon=7))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))
    env.reset(seed=0)
    assert [env.step(np.zeros(4))[3] for _ in range(7)] == [False] * 6 + [True]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4))
    env.close()


def test_the_block_rests_and_the_arm_holds_without_action(env):
    env.reset(seed=1)
    block, hand = env._block_position.copy(), env._hand.copy()
    for _ in range(EPISODE_STEPS):
        env.step([0, 0, 0, 1])
    np.testing.assert_allclose(env._block_position, block, atol=2e-4)
    np.testing.assert_allclose(env._hand, hand, atol=2e-3)


def test_sideways_contact_slides_the_block_below_one_newton():
    # Coulomb friction on the table is an upper bound that a slow push cannot exceed for long: μ m g = 0.25 N.
    env = PandaEnv("touch")
    env.reset(seed=0, options={"hand": (0.44, 0.0, 0.03), "block": (0.5, 0.0)})
    forces = []
    for _ in range(EPISODE_STEPS):
        info = env.step([0.1, 0, 0, 0])[-1]
        forces.append(info["features"]["contact_force"])
    assert info["features"]["block_displacement"] > 0.005
    assert 0.05 < np.median([f for f in forces if f > 0]) < 1.2 * BLOCK_FRICTION * BLOCK_MASS * 9.81
    env.close()


def test_pressing_down_stays_within_newtons():
    env = PandaEnv("touch")
    env.reset(seed=0, options={"hand": (0.5, 0.0, 0.1), "block": (0.5, 0.0)})
    forces = [env.step([0, 0, -1, 0])[-1]["features"]["contact_force"] for _ in range(EPISODE_STEPS)]
    assert 2 < np.median(forces[-20:]) < 20                          # an uncapped arm presses with about 190 N
    env.close()


def test_a_hand_over_the_block_is_above_it_and_a_hand_behind_it_beside_it(env):
    for hand, beside, above in (((0.5, 0.02, 0.12), 0.0, 0.1), ((0.44, 0.10, 0.02), 0.1, 0.0),
                                ((0.5, -0.01, 0.06), 0.03, 0.04)):
        features = env.reset(seed=0, options={"hand": hand, "block": (0.5, 0.02)})[1]["features"]
        assert features["hand_beside_block"] == pytest.approx(beside, abs=2e-3)
        assert features["hand_above_block"] == pytest.approx(above, abs=2e-3)
        assert features["hand_to_block"] == pytest.approx(math.hypot(beside, above), abs=2e-3)


def pose(task, hand=(0.44, 0.05, 0.04), block=(0.5, 0.02, 0.02), goal=(0.6, -0.1), yaw=0.0, velocity=(0.0, 0.0, 0.0), start=None):
    """(state, features) of a scene that is put together by hand, without a step of physics; start: the block's, before it moved."""
    env = PandaEnv(task)
    env.reset(seed=0, options={"hand": hand, "block": start or block[:2], **({"goal": goal} if task == "push" else {})})
    env._sim.resetBasePositionAndOrientation(env._block, block, (0, 0, math.sin(yaw / 2), math.cos(yaw / 2)))
    env._sim.resetBaseVelocity(env._block, velocity)
    env._observe()
    state, features = env._state(), env._features()
    env.close()
    return state, features


def test_a_posed_scene_gives_its_numbers():
    near = 2e-3                                                      # inverse kinematics stops that near to the wanted place, m
    state, features = pose("push", yaw=0.2, velocity=(0.1, -0.2, 0.05), block=(0.5, 0.02, 0.02), start=(0.47, -0.02))
    expected = [20 * -0.06, 20 * 0.05, 20 * -0.06,                   # hand from the middle (0.5, 0, 0.1), in 5 cm
                20 * 0.06, 20 * -0.03, 20 * -0.02,                   # block minus hand
                20 * 0.03, 20 * 0.04,                                # block minus its start
                20 * 0.1, 20 * -0.12,                                # goal minus block
                0, 0, 0, 0, 0, 0, 0,                                 # opening, target minus hand, the hand's speed
                1, -2, 0.5,                                          # the block's speed in dm/s
                math.cos(0.8), math.sin(0.8), 0, 0]                  # four times its yaw; forces
    np.testing.assert_allclose(state[:11], expected[:11], atol=20 * near)
    np.testing.assert_allclose(state[11:14], 0, atol=100 * near)
    np.testing.assert_allclose(state[14:], expected[14:], atol=1e-3)
    assert features == pytest.approx({
        "hand_to_block": 0.07, "hand_beside_block": math.hypot(0.06, 0.03), "hand_above_block": 0.02, "hand_height": 0.04,
        "hand_speed": 0, "contact_force": 0, "block_displacement": 0.05, "block_speed": math.sqrt(0.0525),
        "block_to_goal": math.hypot(0.1, 0.12), "push_alignment": features["push_alignment"]}, abs=near)
    lifted = pose("grasp", block=(0.5, 0.02, 0.09))[1]
    assert lifted["block_height"] == pytest.approx(0.07) and lifted["gripper_opening"] == pytest.approx(0.08, abs=1e-4)
    assert pose("grasp", block=(0.5, 0.02, 0.0199))[1]["block_height"] == 0                  # never below the table
    assert pose("grasp")[0][10] == pytest.approx(20 * 0.08, abs=2e-3)


@pytest.mark.parametrize("hand, cosine", [((0.44, 0.02), 1.0), ((0.5, 0.08), 0.0), ((0.56, 0.02), -1.0), ((0.44, 0.08), math.sqrt(0.5))])
def test_a_push_is_aligned_where_the_block_lies_between_hand_and_goal(hand, cosine):
    assert pose("push", (*hand, 0.03), goal=(0.6, 0.02))[1]["push_alignment"] == pytest.approx(cosine, abs=0.05)


def test_a_block_left_of_the_goal_has_the_goal_on_its_right():
    # Seen from the robot, whose x points forward, y points left.
    state = pose("push", block=(0.5, 0.1, 0.02), goal=(0.5, 0.0))[0]
    assert state[8] == pytest.approx(0, abs=1e-6) and state[9] == pytest.approx(-2)


@pytest.mark.parametrize("axis, sign", [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1)])
def test_a_hand_moves_where_its_action_says_at_the_speed_it_says(axis, sign):
    env, action = PandaEnv("touch"), np.zeros(4)
    env.reset(seed=0, options={"hand": (0.5, 0.0, 0.15), "block": (0.5, 0.1)})
    action[axis] = sign
    places, told = [], []
    for _ in range(12):
        obs, _, _, _, info = env.step(action)
        places.append(env._hand.copy())
        told.append((obs[14:17] / 10, info["features"]["hand_speed"]))
    moved = (places[-1] - places[3]) / (8 * 0.05)                    # m/s; within a step the hand slows down
    velocity, speed = np.mean([v for v, _ in told[4:]], axis=0), np.mean([s for _, s in told[4:]])
    assert 0.1 < sign * moved[axis] < 0.35
    assert velocity[axis] == pytest.approx(moved[axis], rel=0.3) and speed == pytest.approx(abs(moved[axis]), rel=0.3)
    assert np.abs(np.delete(velocity, axis)).max() < 0.05
    np.testing.assert_allclose(obs[11:14], 100 * (env._target - env._hand), atol=1e-4)       # cm
    assert sign * obs[11 + axis] > 0.1                              # the target leads
    env.close()


def test_forces_are_those_of_the_fingers_and_of_all_that_touches():
    env = PandaEnv("grasp")
    obs = env.reset(seed=0, options={"hand": (0.5, 0.02, 0.02), "block": (0.5, 0.02)})[0]
    assert not obs[22:].any()
    for _ in range(15):
        obs, _, _, _, info = env.step([0, 0, 0, -1])
    left, right = np.expm1(obs[22:]) / 10                            # N
    f = info["features"]
    assert min(left, right) == pytest.approx(f["grip_force"], rel=1e-3) and 0.5 < f["grip_force"] < 1.2 * FINGER_FORCE
    assert left + right == pytest.approx(f["contact_force"], rel=1e-3)     # nothing but the fingers touches it
    assert left == pytest.approx(right, rel=0.3)                     # a block at rest is pressed from both sides alike
    env.close()


# Where each episode begins, metres: what the goals' words and DESIGN's tasks promise, once more.
STARTS = {
    "touch": {"block": [(0.48, 0.56), (-0.08, 0.08)], "hand": [(0.36, 0.42), (-0.08, 0.08), (0.05, 0.12)]},
    "grasp": {"block": [(0.45, 0.55), (-0.06, 0.06)], "hand": [(0.45, 0.55), (-0.06, 0.06), (0.12, 0.16)]},
    "push": {"block": [(0.42, 0.48), (-0.06, 0.06)], "hand - block": [(-0.09, -0.06), (-0.02, 0.02)],
             "goal - block": [(0.10, 0.16), (-0.04, 0.04)]}}


@pytest.mark.parametrize("task", list(TASKS))
def test_episodes_begin_anywhere_in_their_ranges(task):
    rng = np.random.default_rng(0)
    starts = [TASKS[task].start(rng.uniform) for _ in range(1000)]
    for name, ranges in STARTS[task].items():
        this, _, other = name.partition(" - ")
        places = np.array([np.array(start[this][:2 if other else 3]) - (start[other] if other else 0.0) for start in starts])
        for values, (low, high) in zip(places.T, ranges, strict=True):
            assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high


def test_a_push_begins_with_the_hand_low_and_spaces_hold_what_is_said():
    assert TASKS["push"].start(np.random.default_rng(0).uniform)["hand"][2] == 0.03
    for obs, low, high, shape in (("state", -10, 10, (24,)), ("pixels", 0, 255, (9, 84, 84))):
        env = PandaEnv("push", obs)
        assert tuple(env.action_space)[:3] == (-1, 1, (4,))
        assert tuple(env.observation_space)[:3] == (low, high, shape)
        env.close()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_action_beyond_one_counts_as_one(axis, sign):
    env, seen = PandaEnv("touch"), {}
    for size in (0.8, 1.0, 5.0):
        env.reset(seed=0, options={"hand": (0.5, 0.0, 0.15), "block": (0.5, 0.1)})
        action = np.zeros(4)
        action[axis] = sign * size
        seen[size] = env.step(action)[0].tobytes()
    assert seen[1.0] == seen[5.0] != seen[0.8]
    env.close()


def test_the_hand_points_down_and_features_say_what_is_usual():
    env = PandaEnv("grasp")
    env.reset(seed=0)
    x, y, z, w = env._sim.getLinkState(env._panda, HAND)[1]
    assert 1 - 2 * (x * x + y * y) == pytest.approx(-1, abs=1e-3)    # its z axis, seen from the world
    env.close()
    assert FEATURES["gripper_opening"].high == 2 * FINGER_MAX
    assert f"friction coefficient of {BLOCK_FRICTION:g}" in " ".join(TASKS["grasp"].details.split())
    assert {name for name, feature in FEATURES.items() if feature.low} == {"hand_above_block", "push_alignment"}


@pytest.mark.parametrize("task", list(TASKS))
def test_readings_of_random_episodes_mostly_lie_where_features_say(task):
    env, rng, rows = PandaEnv(task), np.random.default_rng(0), []
    for episode in range(6):
        env.reset(seed=episode)
        rows += [list(env.step(rng.uniform(-1, 1, 4))[-1]["features"].values()) for _ in range(EPISODE_STEPS)]
    env.close()
    for (name, feature), values in zip(env.task.features.items(), np.array(rows).T, strict=True):
        assert np.mean((feature.low - 1e-6 <= values) & (values <= feature.high + 1e-6)) > 0.9, name


def test_tasks_are_judged_by_what_their_words_say():
    # The numbers of the goals' wording, once more.
    for task, steps, success, limits, words in (
            ("touch", 10, {("contact_force", ">", 0.01)}, {("contact_force", ">", 2.0), ("block_displacement", ">", 0.05)},
             ("10 consecutive", "0.5 s", "2 N", "0.05 m")),
            ("grasp", 5, {("grip_force", ">", 0.0), ("block_height", ">=", 0.08)}, set(),
             ("5 consecutive", "0.25 s", "0.08 m")),
            ("push", 3, {("block_to_goal", "<=", 0.03)}, set(), ("3 consecutive", "0.15 s", "0.03 m"))):
        assert TASKS[task].steps == steps and set(TASKS[task].success) == success and set(TASKS[task].limits) == limits
        assert all(text in TASKS[task].goal for text in words)
        assert all(name in TASKS[task].features for name, _, _ in
                   (*TASKS[task].stages, *TASKS[task].success, *TASKS[task].limits))


def judged(task, features):
    """(reward, success) of each step by the task's words: features is a list of dicts, one per step."""
    holds = {"touch": lambda f: f["contact_force"] > 0.01, "push": lambda f: f["block_to_goal"] <= 0.03,
             "grasp": lambda f: f["grip_force"] > 0 and f["block_height"] >= 0.08}[task]
    steps, outcome = {"touch": 10, "grasp": 5, "push": 3}[task], []
    for t in range(1, len(features) + 1):
        kept = task != "touch" or all(f["contact_force"] <= 2 and f["block_displacement"] <= 0.05 for f in features[:t])
        done = [u >= steps and all(holds(f) for f in features[u - steps:u]) for u in range(1, t + 1)]
        outcome.append((float(kept and done[-1]), kept and any(done)))
    return outcome


def aim(env, point, gain=33):
    return np.clip((np.asarray(point) - env._target) * gain, -1, 1)


def play(env, policy, seed, **reset):
    """An episode's infos; reward and success are checked against the task's words at every step."""
    env.reset(seed=seed, **reset)
    steps = [env.step(policy(t)) for t in range(EPISODE_STEPS)]
    infos = [step[-1] for step in steps]
    seen = [(step[1], step[-1]["success"]) for step in steps]
    assert seen == judged(env.task.name, [info["features"] for info in infos])
    assert all(type(reward) is float and type(success) is bool for reward, success in seen)
    return infos


def test_random_actions_are_judged_by_the_words_too(env):
    rng = np.random.default_rng(1)
    for seed in range(5):
        actions = np.repeat(rng.uniform(-1, 1, (EPISODE_STEPS // 5, 4)), 5, axis=0)       # now and then they reach the block
        play(env, lambda t: actions[t], seed)


def test_each_episode_counts_its_steps_anew():
    env = PandaEnv("push")
    for _ in range(2):                                               # the block is at the goal from start to end
        infos = play(env, lambda t: (0, 0, 0, 0), 0, options={"block": (0.5, 0.0), "goal": (0.51, 0.0)})
        assert [info["success"] for info in infos] == [False] * 2 + [True] * (EPISODE_STEPS - 2)
    env.close()


def gentle(env, t):
    """Touches the side of the block and goes on pushing it as slowly as can be."""
    side = env._block_position - (0.045, 0, -0.01)
    return [*(aim(env, side) if t < 20 else (0.1, 0, 0)), 0]


def test_touch_gently_succeeds_and_roughly_fails():
    env = PandaEnv("touch")
    for seed in range(3):
        infos = play(env, lambda t: gentle(env, t), seed)
        contact = [info["features"]["contact_force"] > 0.01 for info in infos]
        first = next(t for t in range(EPISODE_STEPS) if t >= 9 and all(contact[t - 9:t + 1]))
        success = [info["success"] for info in infos]
        assert success.index(True) == first and all(success[first:])

        def roughly(t):
            return [*(aim(env, env._block_position - (0.06, 0, 0)) if t < 15 else (1, 0, 0)), 0]
        infos = play(env, roughly, seed)
        assert max(info["features"]["block_displacement"] for info in infos) > 0.05
        assert not any(info["success"] for info in infos)
    env.close()


def test_success_stays_when_the_hand_lets_go_and_is_lost_when_a_limit_breaks_later():
    env, outcomes = PandaEnv("touch"), []

    def press_from_above(t):
        x, y, _ = env._block_position
        return (-0.5, 0, 1, 0) if t < 30 else (*aim(env, (x, y, 0.08)), 0) if t < 38 else (0, 0, -1, 0)
    for then in (lambda t: (-1, 0, 0.5, 0), lambda t: (1, 0, 0, 0), press_from_above):
        infos = play(env, lambda t: (0.1, 0, 0, 0) if t < 25 else then(t), 0,
                     options={"hand": (0.458, 0.0, 0.03), "block": (0.5, 0.0)})
        success = [info["success"] for info in infos]
        force = np.array([info["features"]["contact_force"] for info in infos])
        moved = np.array([info["features"]["block_displacement"] for info in infos])
        first = success.index(True)
        assert first < 25 and all(force[first - 9:first + 1] > 0.01)
        assert force[:25].max() <= 2 and moved[:25].max() <= 0.05
        broken = next((t for t in range(EPISODE_STEPS) if force[t] > 2 or moved[t] > 0.05), EPISODE_STEPS)
        assert all(success[first:broken]) and not any(success[broken:])
        outcomes.append("kept" if broken == EPISODE_STEPS else "pressed" if force[broken] > 2 else "shoved")
    assert outcomes == ["kept", "shoved", "pressed"]
    env.close()


def test_a_touch_of_more_than_two_newtons_fails():
    env = PandaEnv("touch")

    def press(t):
        return [0, 0, -1, 0]
    infos = play(env, press, 0, options={"hand": (0.5, 0, 0.1), "block": (0.5, 0)})
    forces = [info["features"]["contact_force"] for info in infos]
    assert sum(f > 0.01 for f in forces) > 10 and max(forces) > 2
    assert not any(info["success"] for info in infos)
    env.close()


def test_grasp_and_lift_succeeds_and_holds_by_friction_alone():
    env = PandaEnv("grasp")
    for seed in range(3):
        def grasp(t):
            if t < 10:
                return [*aim(env, (*env._block_position[:2], 0.10)), 1]
            if t < 22:
                return [*aim(env, (*env._block_position[:2], 0.02)), 1]
            return [0, 0, 0 if t < 28 else 1, -1]
        infos = play(env, grasp, seed)
        features = infos[-1]["features"]
        assert infos[-1]["success"] and features["block_height"] > 0.08 and features["grip_force"] > 0
        assert features["gripper_opening"] == pytest.approx(0.04, abs=0.004)
    # Opened again, the block falls: the skill is not shown any more, but it was.
    env.t = 0
    for _ in range(15):
        _, reward, _, _, info = env.step([0, 0, 0, 1])
    assert info["features"]["block_height"] < 0.01 and info["features"]["grip_force"] == 0
    assert reward == 0.0 and info["success"]
    env.close()


def test_push_to_the_goal_succeeds():
    env, successes = PandaEnv("push"), 0
    for seed in range(5):
        def push(t):
            block, ahead = env._block_position[:2], env._goal - env._block_position[:2]
            if np.linalg.norm(ahead) < 0.015:
                return [0, 0, 0, 0]
            return [*aim(env, (*(block + 0.5 * ahead / np.linalg.norm(ahead) * 0.02), 0.03), 20), 0]
        infos = play(env, push, seed)
        succeeded = [info["success"] for info in infos]
        distances = [info["features"]["block_to_goal"] for info in infos]
        if any(succeeded):
            first = succeeded.index(True)
            assert all(d <= 0.03 for d in distances[first - 2:first + 1])
            assert all(succeeded[first:])
            successes += 1
    assert successes >= 4
    env.close()


def test_target_leads_the_hand_by_little_and_stays_in_the_workspace(env):
    env.reset(seed=0)
    for t in range(EPISODE_STEPS):
        env.step([1, 1, -1, 0] if t < 25 else [-1, -1, 1, 0])
        assert (env._target >= WORKSPACE[0]).all() and (env._target <= WORKSPACE[1]).all()
        assert np.abs(env._target - env._hand).max() < 0.045


def test_pixels_are_three_stacked_frames_that_show_the_scene():
    env = PandaEnv("push", obs="pixels")
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (9, 84, 84) and obs.dtype == np.uint8
    np.testing.assert_array_equal(obs[:3], obs[6:])
    red = (obs[6].astype(int) - obs[7] > 60).sum()                   # the block
    assert red > 20
    new, *_ = env.step([1, 0, 0, 0])
    np.testing.assert_array_equal(new[:6], obs[3:])
    assert (new[6:] != obs[6:]).any()
    env.close()
    env = PandaEnv("push", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (480, 480, 3) and env.render().std() > 10
    env.close()


@pytest.mark.parametrize("task, start, goal", [("touch", True, False), ("grasp", False, False), ("push", False, True)])
def test_images_show_the_goal_or_where_a_block_that_must_stay_near_it_has_started(task, start, goal):
    env = PandaEnv(task, obs="pixels")
    env.reset(seed=0)
    x, y, z = env._block_position
    env._sim.resetBasePositionAndOrientation(env._block, (x + 0.1, y + 0.1, z), (0, 0, 0, 1))     # it no longer hides the disc
    frame = env.step(np.zeros(4))[0][6:].astype(int)
    green = (frame[1] > frame[0] + 40) & (frame[1] > frame[2] + 40)
    assert (green.sum() > 15) == (start or goal)
    assert np.allclose(env._goal, [x, y]) != goal
    env.close()


def test_a_policy_is_shown_with_the_images_that_it_has_learnt_from():
    trained, shown = PandaEnv("push", obs="pixels"), PandaEnv("push", obs="pixels", render_mode="rgb_array")
    for one, other in zip(trained.reset(seed=0)[:1] + trained.step([1, 0, 0, 0])[:1], shown.reset(seed=0)[:1] + shown.step([1, 0, 0, 0])[:1]):
        np.testing.assert_array_equal(one, other)
    trained.close()
    shown.close()


def test_readme_wrapper_passes_gymnasiums_checker(env):
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    source = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gymnasium.Env" in code)
    namespace = {}
    exec(source, namespace)
    wrapped = namespace["GymPanda"](env.task)
    assert isinstance(wrapped, gymnasium.Env)
    check_env(wrapped, skip_render_check=True)
    wrapped.close()
