"""The buffer against examples written out and against a naive one; the agent against what DrQ-v2 promises."""

import numpy as np
import pytest
import torch

from drqv2 import DrQV2, ReplayBuffer, linear_schedule, random_shift, truncated_normal


def fill(buffer, lengths, terminated=False, rng=None):
    """Episodes whose observation is (episode, step) and whose reward is 10 · episode + step."""
    for episode, length in enumerate(lengths):
        buffer.begin(np.array([episode, 0.0]))
        for t in range(length):
            done = t == length - 1
            buffer.add([0.0], np.array([episode, t + 1.0]), 10.0 * episode + t, done and terminated,
                       done and not terminated, [episode, t])


@pytest.mark.parametrize("terminated", [False, True])
def test_n_step_targets_of_a_written_out_episode(terminated):
    # Rewards 1, 2, 3, 4 with γ = 0.5 and n = 3.
    buffer = ReplayBuffer(100, (1,), (1,), nstep=3, discount=0.5)
    buffer.begin(np.array([0.0]))
    for t in range(4):
        buffer.add([t], np.array([t + 1.0]), t + 1.0, terminated and t == 3, not terminated and t == 3)
    expected = {0: (1 + 2 / 2 + 3 / 4, 1 / 8, 3), 1: (2 + 3 / 2 + 4 / 4, 1 / 8, 4), 2: (3 + 4 / 2, 1 / 4, 4),
                3: (4, 1 / 2, 4)}
    obs, action, reward, discount, next_obs = buffer.sample(500)
    assert set(obs[:, 0]) == {0, 1, 2, 3}
    for o, a, r, d, n in zip(obs[:, 0], action[:, 0], reward, discount, next_obs[:, 0]):
        return_, gamma, last = expected[int(o)]
        assert a == o and r == return_ and n == last
        assert d == (0 if terminated and last == 4 else gamma)


def test_sampling_is_uniform_over_transitions():
    buffer = ReplayBuffer(100, (2,), (1,), n_features=2)
    fill(buffer, [1, 5, 3])
    obs = buffer.sample(9000)[0]
    _, counts = np.unique(obs, axis=0, return_counts=True)
    assert len(counts) == 9 and counts.min() > 850 and counts.max() < 1150


def test_ring_agrees_with_a_naive_buffer():
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(37, (2,), (1,), n_features=2, nstep=3, discount=0.9)
    lengths = rng.integers(1, 12, 60)
    fill(buffer, lengths)
    rows = [(e, t, n) for e, n in enumerate(lengths) for t in range(n + 1)]          # a row per observation
    kept = {(e, t) for e, t, n in rows[-37:] if t < n}
    assert len(buffer) == len(kept)
    seen = set()
    for o, _, r, d, n in zip(*buffer.sample(2000)):
        e, t = int(o[0]), int(o[1])
        m = min(3, lengths[e] - t)
        assert r == pytest.approx(sum(0.9 ** k * (10 * e + t + k) for k in range(m)))
        assert d == pytest.approx(0.9 ** m) and tuple(n) == (e, t + m)
        seen.add((e, t))
    assert seen == kept


def test_open_episode_is_not_sampled_and_overwrites_safely():
    buffer = ReplayBuffer(20, (2,), (1,), n_features=2)
    with pytest.raises(ValueError, match="no episode has ended"):
        buffer.sample(1)
    fill(buffer, [9, 9])
    buffer.begin(np.array([2.0, 0.0]))
    for t in range(6):
        buffer.add([0.0], np.array([2.0, t + 1.0]), 0.0, False, False, [2, t])
    obs = buffer.sample(500)[0]
    assert set(map(tuple, obs)) == {(0, t) for t in range(7, 9)} | {(1, t) for t in range(9)}
    with pytest.raises(ValueError, match="raise capacity"):
        for t in range(20):
            buffer.add([0.0], np.zeros(2), 0.0, False, False, [0, 0])


def test_frames_are_stored_once_and_stacked_from_the_episode_start():
    buffer = ReplayBuffer(64, (9, 4, 4), (1,), obs_dtype=np.uint8, frame_stack=3)
    stacks = {}
    for episode in range(9):                                        # more than the ring holds
        frames = [np.full((3, 4, 4), 20 * episode)] * 3
        buffer.begin(np.concatenate(frames))
        stacks[20 * episode] = np.concatenate(frames)
        for t in range(1, 11):
            frames = frames[1:] + [np.full((3, 4, 4), 20 * episode + t)]
            stacks[20 * episode + t] = np.concatenate(frames)
            buffer.add([0.0], np.concatenate(frames), 0.0, False, t == 10)
    assert buffer.obs.shape == (64, 3, 4, 4)
    obs, _, _, _, next_obs = buffer.sample(2000)
    seen = set()
    for o, n in zip(obs, next_obs):
        newest = int(o[-1, 0, 0])
        seen.add(newest)
        np.testing.assert_array_equal(o, stacks[newest])
        np.testing.assert_array_equal(n, stacks[min(newest + 3, newest // 20 * 20 + 10)])
    # The ring holds the last 64 of 99 rows: from step 2 of episode 3, whose own stack lacks a frame, as does step 3's.
    assert seen == {20 * 3 + t for t in range(4, 10)} | {20 * e + t for e in range(4, 9) for t in range(10)}


def test_relabel_changes_every_reward_and_nothing_else():
    buffer = ReplayBuffer(100, (2,), (1,), n_features=2, nstep=1)
    fill(buffer, [4, 6])
    buffer.begin(np.array([2.0, 0.0]))
    buffer.add([0.0], np.array([2.0, 1.0]), 5.0, False, False, [2, 0])
    buffer.relabel(lambda features: 100 * features[:, 0] + features[:, 1] ** 2)
    for o, _, r, _, _ in zip(*buffer.sample(300)):
        assert r == 100 * o[0] + o[1] ** 2
    assert buffer.reward[buffer.rows - 2] == 200                    # also in the episode that is still open
    episodes = buffer.episodes()
    assert [len(e) for e in episodes] == [4, 6]
    np.testing.assert_array_equal(episodes[1], [[1, t] for t in range(6)])
    assert len(buffer.episodes(since=5)) == 1


def test_random_shift_is_one_of_the_integer_shifts_and_keeps_channels_together():
    image = torch.rand(1, 3, 12, 12)
    padded = torch.nn.functional.pad(image, (4,) * 4, mode="replicate")
    shifts = [padded[:, :, i:i + 12, j:j + 12] for i in range(9) for j in range(9)]
    seen = set()
    for shifted in random_shift(image.repeat(300, 1, 1, 1), pad=4).split(1):
        errors = [float((shifted - s).abs().max()) for s in shifts]
        assert min(errors) < 1e-4
        seen.add(int(np.argmin(errors)))
    assert len(seen) > 60
    with pytest.raises(ValueError, match="square"):
        random_shift(torch.zeros(1, 3, 12, 10))


def test_truncated_normal_stays_inside_and_passes_gradients():
    torch.manual_seed(0)
    mean = torch.tensor([-1.0, 0.0, 0.99]).repeat(2000, 1).requires_grad_()
    sample = truncated_normal(mean, 1.0)
    assert sample.abs().max() < 1
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    clipped = truncated_normal(torch.zeros(5000), 1.0, clip=0.3)
    assert clipped.abs().max() <= 0.3 + 1e-6


def test_linear_schedule():
    assert linear_schedule(0, 1.0, 0.1, 100) == 1.0
    assert linear_schedule(50, 1.0, 0.1, 100) == pytest.approx(0.55)
    assert linear_schedule(1000, 1.0, 0.1, 100) == pytest.approx(0.1)


def test_learns_a_one_step_task_and_bootstraps_a_value():
    # Reward 1 − |a − 0.5| at every step of endless episodes: the best action is 0.5, its value 1 / (1 − γ).
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    agent = DrQV2((2,), (1,), lr=1e-3, hidden_dim=64, std=(0.3, 0.1, 500))
    buffer = ReplayBuffer(2000, (2,), (1,), discount=0.8)
    for _ in range(30):
        buffer.begin(np.ones(2))
        for t in range(20):
            action = rng.uniform(-1, 1, 1)
            buffer.add(action, np.ones(2), 1 - abs(action[0] - 0.5), False, t == 19)
    for step in range(1500):
        losses = agent.update(buffer.sample(64), step)
    assert agent.act(np.ones(2), 0, explore=False) == pytest.approx(0.5, abs=0.15)
    # Off-policy n-step returns bootstrap from behaviour, so the value lies between uniform actions' and the best's.
    assert 2.5 < losses["q"] < 5.0


def test_encoder_learns_from_the_critic_only(monkeypatch):
    # Without shift, noise and steps, the encoder's gradient after an update must be that of the critic's loss alone.
    torch.manual_seed(0)
    monkeypatch.setattr("drqv2.random_shift", lambda images: images)
    agent = DrQV2((9, 84, 84), (4,), hidden_dim=32, std=(0.0, 0.0, 1))
    assert agent.encoder(torch.zeros(1, 9, 84, 84)).shape == (1, 32 * 35 * 35)
    agent.critic_opt.step = agent.actor_opt.step = lambda: None
    rng = np.random.default_rng(0)
    batch = (rng.integers(0, 256, (4, 9, 84, 84), dtype=np.uint8), rng.uniform(-1, 1, (4, 4)).astype(np.float32),
             rng.random(4), np.full(4, 0.9), rng.integers(0, 256, (4, 9, 84, 84), dtype=np.uint8))
    agent.update(batch, 0)
    got = [p.grad.clone() for p in agent.encoder.parameters()]

    obs, action, reward, discount, next_obs = (torch.as_tensor(a).float() for a in batch)
    h, next_h = agent.encoder(obs), agent.encoder(next_obs)
    with torch.no_grad():
        q1, q2 = agent.critic_target(next_h, agent.actor(next_h))
        y = reward[:, None] + discount[:, None] * torch.minimum(q1, q2)
    q1, q2 = agent.critic(h, action)
    loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
    for gradient, expected in zip(got, torch.autograd.grad(loss, list(agent.encoder.parameters()))):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_updates_shift_both_observations_clip_noise_and_take_the_smaller_q(monkeypatch):
    torch.manual_seed(0)
    shifted, noises, taken = [], [], []
    monkeypatch.setattr("drqv2.random_shift", lambda images: shifted.append(images) or images)
    real = truncated_normal
    monkeypatch.setattr("drqv2.truncated_normal", lambda mean, std, clip=None: noises.append((std, clip)) or real(mean, std, clip))
    real_min = torch.min
    monkeypatch.setattr(torch, "min", lambda *args: taken.append(args) or real_min(*args))
    agent = DrQV2((9, 84, 84), (1,), hidden_dim=8, std=(1.0, 0.5, 100))
    obs = np.zeros((2, 9, 84, 84), np.uint8)
    agent.update((obs, np.zeros((2, 1)), np.zeros(2), np.ones(2), obs + 1), 50)
    assert len(shifted) == 2 and shifted[1].max() == 1               # obs and next_obs
    assert noises == [(0.75, 0.3), (0.75, 0.3)]                      # target's action and actor's
    assert len(taken) == 2 and all(len(pair) == 2 for pair in taken)
    noises.clear()
    agent.act(obs[0], 50)
    assert noises == [(0.75, None)]                                  # exploration is not clipped
    with pytest.raises(ValueError, match="begin"):
        ReplayBuffer(9, (1,), (1,)).add([0], [0], 0.0, False, False)


def test_targets_follow_slowly_and_states_round_trip():
    torch.manual_seed(0)
    agent = DrQV2((3,), (2,), hidden_dim=16, lr=1e-2, tau=0.1)
    rng = np.random.default_rng(0)
    batch = (rng.random((8, 3)), rng.uniform(-1, 1, (8, 2)), rng.random(8), np.full(8, 0.9), rng.random((8, 3)))
    old = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(batch, 0)
    for target, before, critic in zip(agent.critic_target.parameters(), old, agent.critic.parameters()):
        torch.testing.assert_close(target, 0.9 * before + 0.1 * critic)
    other = DrQV2((3,), (2,), hidden_dim=16)
    other.load_state_dict(agent.state_dict())
    np.testing.assert_array_equal(other.act(np.ones(3), 0, explore=False), agent.act(np.ones(3), 0, explore=False))
