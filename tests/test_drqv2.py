"""The buffer against examples written out and against a naive one; the agent against what DrQ-v2 promises."""

import copy
import inspect
import io

import numpy as np
import pytest
import torch

from drqv2 import DrQV2, ReplayBuffer, linear_schedule, random_shift, truncated_normal


def fill(buffer, lengths, terminated=False, first=0):
    """Episodes whose observation is (episode, step) and whose reward is 10 · episode + step."""
    for episode, length in enumerate(lengths, first):
        buffer.begin(np.array([episode, 0.0]))
        for t in range(length):
            done = t == length - 1
            buffer.add(
                [0.0],
                np.array([episode, t + 1.0]),
                10.0 * episode + t,
                done and terminated,
                done and not terminated,
                [episode, t],
            )


@pytest.mark.parametrize("terminated", [False, True])
def test_n_step_targets_of_a_written_out_episode(terminated):
    # Rewards 1, 2, 3, 4 with γ = 0.5 and n = 3.
    buffer = ReplayBuffer(100, (1,), (1,), nstep=3, discount=0.5)
    buffer.begin(np.array([0.0]))
    for t in range(4):
        buffer.add(
            [t], np.array([t + 1.0]), t + 1.0, terminated and t == 3, not terminated and t == 3
        )
    expected = {
        0: (1 + 2 / 2 + 3 / 4, 1 / 8, 3),
        1: (2 + 3 / 2 + 4 / 4, 1 / 8, 4),
        2: (3 + 4 / 2, 1 / 4, 4),
        3: (4, 1 / 2, 4),
    }
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
    # After each of many episodes, so that the ring's oldest row has been every row of an episode.
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(37, (2,), (1,), n_features=2, nstep=3, discount=0.9)
    rows, lengths, ends = [], [], []  # a row per observation: (episode, step)
    for episode in range(60):
        lengths.append(int(rng.integers(1, 12)))
        ends.append(bool(rng.random() < 0.5))  # terminated, or else out of time
        fill(buffer, lengths[-1:], ends[-1], first=episode)
        rows += [(episode, t) for t in range(lengths[-1] + 1)]
        kept = {(e, t) for e, t in rows[-37:] if t < lengths[e]}
        assert len(buffer) == len(kept)
        obs, _, reward, discount, next_obs = buffer.sample(600)
        starts = [(int(e), int(t)) for e, t in obs]
        assert set(starts) == kept and len(starts) == 600
        steps = [min(3, lengths[e] - t) for e, t in starts]
        np.testing.assert_array_equal(next_obs, [(e, t + m) for (e, t), m in zip(starts, steps)])
        np.testing.assert_allclose(
            reward,
            [sum(0.9**k * (10 * e + t + k) for k in range(m)) for (e, t), m in zip(starts, steps)],
        )
        np.testing.assert_allclose(
            discount,
            [0 if ends[e] and t + m == lengths[e] else 0.9**m for (e, t), m in zip(starts, steps)],
        )
        # Episodes are shown whole or not at all.
        whole = [e for e in range(episode + 1) if (e, 0) in rows[-37:]]
        for features, e in zip(buffer.episodes(), whole, strict=True):
            np.testing.assert_array_equal(features, [(e, t) for t in range(lengths[e])])


def test_the_longest_episode_fills_the_buffer():
    buffer = ReplayBuffer(9, (2,), (1,), n_features=2, nstep=1)
    fill(buffer, [8])  # and its last observation
    assert len(buffer) == 8
    with pytest.raises(ValueError, match="raise capacity"):
        fill(buffer, [9])


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
    for episode in range(9):  # more than the ring holds
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
    assert seen == {20 * 3 + t for t in range(4, 10)} | {
        20 * e + t for e in range(4, 9) for t in range(10)
    }


def test_relabel_changes_every_reward_and_nothing_else():
    buffer = ReplayBuffer(100, (2,), (1,), n_features=2, nstep=1)
    fill(buffer, [4, 6])
    buffer.begin(np.array([2.0, 0.0]))
    buffer.add([0.0], np.array([2.0, 1.0]), 5.0, False, False, [2, 0])
    seen = []

    def reward(features):
        seen.extend(features.tolist())
        return 100 * features[:, 0] + features[:, 1] ** 2

    buffer.relabel(reward)
    assert seen == [[e, t] for e, n in ((0, 4), (1, 6)) for t in range(n)] + [
        [2, 0]
    ]  # of every step taken, and of no other row
    for o, _, r, _, _ in zip(*buffer.sample(300)):
        assert r == 100 * o[0] + o[1] ** 2
    assert buffer.reward[buffer.rows - 2] == 200  # also in the episode that is still open
    episodes = buffer.episodes()
    assert [len(e) for e in episodes] == [4, 6]
    np.testing.assert_array_equal(episodes[1], [[1, t] for t in range(6)])


def shifted(images):
    """The paper's shift, without interpolation: a window at a random place of the image, its edges repeated by 4."""
    size, padded = (
        images.shape[-1],
        np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge"),
    )
    corners = torch.randint(0, 9, (len(images), 1, 1, 2)).reshape(-1, 2).tolist()
    return torch.as_tensor(
        np.stack([image[:, y : y + size, x : x + size] for image, (x, y) in zip(padded, corners)])
    )


def test_random_shift_moves_each_image_by_whole_pixels_and_keeps_channels_together():
    images = torch.rand(
        8, 3, 84, 84, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(1)
    got = random_shift(images)
    torch.manual_seed(1)
    torch.testing.assert_close(got, shifted(images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="square"):
        random_shift(torch.zeros(1, 3, 12, 10))


@pytest.mark.parametrize("pad", [2, 4])
def test_random_shifts_are_equally_likely(pad):
    # The pixels of the image are numbered, so the first one tells the shift.
    torch.manual_seed(0)
    image, n = torch.arange(144.0).reshape(1, 1, 12, 12), 2 * pad + 1
    padded = torch.nn.functional.pad(image, (pad,) * 4, mode="replicate")[0, 0]
    windows = torch.stack(
        [padded[i : i + 12, j : j + 12] for i in range(n) for j in range(n)]
    ).flatten(1)
    got = random_shift(image.repeat(100 * n * n, 1, 1, 1), pad).flatten(1)
    distance, which = torch.cdist(got, windows, p=float("inf")).min(dim=1)
    assert distance.max() < 1e-2
    counts = torch.bincount(which, minlength=n * n)
    assert counts.min() > 50 and counts.max() < 150


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


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def hidden(p, x):
    """The trunk: a linear layer, normalised and squashed."""
    x = linear(p, "trunk.0", x)
    x = (x - x.mean(1, keepdim=True)) / torch.sqrt(
        ((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True) + 1e-5
    )
    return torch.tanh(x * p["trunk.1.weight"] + p["trunk.1.bias"])


def head(p, name, x):
    for layer in (0, 2):
        x = torch.clamp(linear(p, f"{name}.{layer}", x), min=0)
    return linear(p, f"{name}.4", x)


def smaller_q(p, obs, action):
    both = torch.cat([hidden(p, obs), action], 1)
    return torch.where(
        head(p, "q1", both) < head(p, "q2", both), head(p, "q1", both), head(p, "q2", both)
    )


def noisy(action, std):
    """Equation 1's and 2's action: clipped noise on it, kept inside (−1, 1) without stopping the gradient."""
    noisy = action + torch.clamp(std * torch.randn(action.shape), -0.3, 0.3)
    return noisy + (torch.clamp(noisy, -1 + 1e-6, 1 - 1e-6) - noisy).detach()


class Adam:
    """Kingma & Ba (2015), algorithm 1."""

    def __init__(self, params, lr):
        self.params, self.lr, self.t = params, lr, 0
        self.m, self.v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in "mv")

    def step(self, loss):
        self.t += 1
        for (name, p), g in zip(
            self.params.items(), torch.autograd.grad(loss, list(self.params.values()))
        ):
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            p.data -= self.lr * m / (torch.sqrt(v) + 1e-8)


def batch_of(rng, size=16, obs=3, actions=2):
    return (
        rng.standard_normal((size, obs)),
        rng.uniform(-1, 1, (size, actions)),
        rng.standard_normal(size),
        rng.uniform(0, 1, size),
        rng.standard_normal((size, obs)),
    )


def encoded(p, obs, strides=(2, 1, 1, 1)):
    """Four 3×3 convolutions, written as sums over patches; states are what they are."""
    if obs.dim() == 2:
        return obs
    x = obs / 255 - 0.5
    for layer, stride in zip((0, 2, 4, 6), strides):
        patches = x.unfold(2, 3, stride).unfold(3, 3, stride)
        x = torch.einsum("bchwij,ocij->bohw", patches, p[f"convnet.{layer}.weight"])
        x = torch.clamp(x + p[f"convnet.{layer}.bias"][:, None, None], min=0)
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("strides, features", [((2, 1, 1, 1), 39200), ((2, 2, 1, 1), 8192)])
def test_encoder_is_four_convolutions_of_centred_pixels(strides, features):
    torch.manual_seed(0)
    encoder = DrQV2((9, 84, 84), (4,), hidden_dim=8, strides=strides).encoder
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.01 * torch.randn_like(p))  # biases are zero at first
        images = torch.randint(0, 256, (2, 9, 84, 84)).float()
        assert encoder(images).shape == (2, features)
        torch.testing.assert_close(
            encoder(images), encoded(encoder.state_dict(), images, strides), rtol=0, atol=1e-5
        )


def test_the_encoder_is_the_papers_by_default_and_has_four_strides():
    assert DrQV2((9, 84, 84), (4,), hidden_dim=8).encoder.out_dim == 39200
    with pytest.raises(ValueError):
        DrQV2((9, 84, 84), (4,), strides=(2, 2, 1))


def test_weights_start_orthogonal_and_biases_at_zero():
    torch.manual_seed(0)
    agent = DrQV2((9, 84, 84), (4,), hidden_dim=64)
    checked = 0
    for net in (agent.encoder, agent.actor, agent.critic):
        for layer in net.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                w = layer.weight.flatten(1)
                gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
                gain = 2 if isinstance(layer, torch.nn.Conv2d) else 1  # a ReLU's, squared
                torch.testing.assert_close(gram, gain * torch.eye(len(gram)), rtol=0, atol=1e-4)
                assert not layer.bias.any()
                checked += 1
    assert checked == 4 + 4 + 7
    for target, critic in zip(agent.critic_target.parameters(), agent.critic.parameters()):
        assert torch.equal(target, critic)


def test_two_critics_give_one_value_each_and_differ():
    torch.manual_seed(0)
    agent = DrQV2((3,), (2,), hidden_dim=8)
    q1, q2 = agent.critic(torch.randn(5, 3), torch.randn(5, 2))
    assert q1.shape == q2.shape == (5, 1) and (q1 != q2).any()


def test_defaults_are_the_papers():
    # Yarats et al. (2021), table of hyper-parameters and the authors' configuration.
    agent = {name: p.default for name, p in inspect.signature(DrQV2).parameters.items()}
    assert [
        agent[name]
        for name in (
            "lr",
            "feature_dim",
            "hidden_dim",
            "tau",
            "std",
            "noise_clip",
            "saturation",
            "average",
        )
    ] == [1e-4, 50, 1024, 0.01, (1.0, 0.1, 100_000), 0.3, 0.0, 1.0]
    buffer = {name: p.default for name, p in inspect.signature(ReplayBuffer).parameters.items()}
    assert buffer["nstep"] == 3 and buffer["discount"] == 0.99
    assert inspect.signature(random_shift).parameters["pad"].default == 4


@pytest.mark.parametrize("obs_shape, saturation", [((3,), 0.0), ((3,), 0.3), ((6, 20, 20), 0.0)])
def test_updates_are_the_published_equations_and_the_penalty_is_the_only_other_term(
    obs_shape, saturation
):
    torch.manual_seed(0)
    lr, tau, pixels = 1e-3, 0.1, len(obs_shape) == 3
    agent = DrQV2(
        obs_shape,
        (2,),
        lr=lr,
        feature_dim=5,
        hidden_dim=8,
        tau=tau,
        std=(0.4, 0.2, 100),
        saturation=saturation,
    )
    with torch.no_grad():
        for p in agent.actor.policy[-1].parameters():
            p.add_(torch.randn_like(p))  # so that the pre-activations matter
    encoder, actor, critic, target = (
        {name: p.clone().requires_grad_() for name, p in net.state_dict().items()}
        for net in (agent.encoder, agent.actor, agent.critic, agent.critic_target)
    )
    critic = {**critic, **encoder}  # learn from one loss, in one optimiser
    actor_adam, critic_adam = Adam(actor, lr), Adam(critic, lr)
    rng = np.random.default_rng(0)
    for step in range(3):
        batch = list(batch_of(rng))
        if pixels:
            batch[0], batch[4] = (
                rng.integers(0, 256, (16, *obs_shape), dtype=np.uint8) for _ in "on"
            )
        torch.manual_seed(step)
        losses = agent.update(batch, 50)  # halfway through the schedule: σ = 0.3
        torch.manual_seed(step)
        obs, action, reward, discount, next_obs = (torch.as_tensor(a).float() for a in batch)
        if pixels:
            obs, next_obs = shifted(obs), shifted(next_obs)
        # Equation 1: both critics' squared errors from one target.
        with torch.no_grad():
            next_h = encoded(critic, next_obs)
            next_action = noisy(torch.tanh(head(actor, "policy", hidden(actor, next_h))), 0.3)
            y = reward[:, None] + discount[:, None] * smaller_q(target, next_h, next_action)
        h = encoded(critic, obs)
        both = torch.cat([hidden(critic, h), action], 1)
        q1, q2 = head(critic, "q1", both), head(critic, "q2", both)
        critic_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        critic_adam.step(critic_loss)
        # Equation 2: the smaller Q of the critic that has just learnt, of what the encoder saw before.
        h = h.detach()
        u = head(actor, "policy", hidden(actor, h))
        actor_loss = (
            -smaller_q(critic, h, noisy(torch.tanh(u), 0.3)).mean()
            + saturation * (u**2).sum() / u.numel()
        )
        actor_adam.step(actor_loss)
        for name in target:
            target[name] = ((1 - tau) * target[name] + tau * critic[name]).detach()
        assert losses["critic_loss"] == pytest.approx(critic_loss.item(), abs=1e-5)
        assert losses["actor_loss"] == pytest.approx(actor_loss.item(), abs=1e-5)
        assert losses["q"] == pytest.approx(q1.mean().item(), abs=1e-5)
    for net, restated in (
        (agent.encoder, critic),
        (agent.actor, actor),
        (agent.critic, critic),
        (agent.critic_target, target),
        (agent.greedy[0], critic),
        (agent.greedy[1], actor),
    ):
        for name, p in net.state_dict().items():
            torch.testing.assert_close(p, restated[name].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("saturation", [0.0, 0.1])
def test_a_saturated_actor_comes_back_by_the_penalty_alone(saturation):
    # A critic that is zero everywhere, and stays so without reward, says nothing about actions.
    torch.manual_seed(0)
    agent = DrQV2(
        (3,), (2,), lr=0.03, feature_dim=5, hidden_dim=8, std=(0.1, 0.1, 1), saturation=saturation
    )
    with torch.no_grad():
        agent.actor.policy[-1].bias.copy_(torch.tensor([6.0, -6.0]))
        for p in [*agent.critic.parameters(), *agent.critic_target.parameters()]:
            p.zero_()
    obs, action, reward, discount, next_obs = batch_of(np.random.default_rng(0))
    before = [p.clone() for p in agent.actor.parameters()]
    for step in range(150):
        losses = agent.update((obs, action, 0 * reward, discount, next_obs), step)
    last = np.array([agent.act(o, 0, explore=False) for o in obs])
    if saturation:
        assert np.abs(last).max() < 0.3
    else:
        assert losses["actor_loss"] == 0 and (np.abs(last) > 0.999).all()
        assert all(torch.equal(p, q) for p, q in zip(agent.actor.parameters(), before))


@pytest.mark.parametrize("obs_shape", [(3,), (3, 20, 20)])
def test_the_greedy_policy_is_an_average_that_training_never_sees(obs_shape):
    rng, agents, averages = np.random.default_rng(0), [], []
    scale = 1 if len(obs_shape) == 1 else 255
    batches = [
        (
            scale * rng.random((4, *obs_shape)),
            rng.uniform(-1, 1, (4, 2)),
            rng.random(4),
            np.ones(4),
            scale * rng.random((4, *obs_shape)),
        )
        for _ in range(4)
    ]
    obs = scale * rng.random(obs_shape)
    for average in (1.0, 0.2):
        torch.manual_seed(0)
        agent = DrQV2(obs_shape, (2,), lr=1e-2, hidden_dim=16, std=(0.0, 0.0, 1), average=average)
        agents.append(agent)
        averages.append(
            [p.clone() for p in (*agent.encoder.parameters(), *agent.actor.parameters())]
        )
        for step, batch in enumerate(batches):
            agent.update(batch, step)
            averages[-1] = [
                (1 - average) * slow + average * fast
                for slow, fast in zip(
                    averages[-1], (*agent.encoder.parameters(), *agent.actor.parameters())
                )
            ]
    published, averaged = agents
    for name in ("encoder", "actor", "critic", "critic_target"):
        for p, q in zip(
            getattr(published, name).parameters(), getattr(averaged, name).parameters()
        ):
            assert torch.equal(p, q)
    for agent, average in zip(agents, averages):
        assert len(average) == len([*agent.greedy.parameters()])
        for p, q in zip(agent.greedy.parameters(), average):
            torch.testing.assert_close(p, q)
    # Exploration without noise is encoder and actor themselves; only the greedy policy is the average.
    np.testing.assert_array_equal(published.act(obs, 0), averaged.act(obs, 0))
    np.testing.assert_array_equal(published.act(obs, 0, explore=False), published.act(obs, 0))
    greedy = averaged.greedy(torch.as_tensor(obs).float()[None])[0].numpy()
    np.testing.assert_array_equal(averaged.act(obs, 0, explore=False), greedy)
    assert np.abs(greedy - averaged.act(obs, 0)).max() > 1e-3


def test_convolutions_in_bfloat16_learn_as_those_in_float32_do():
    """A bfloat16 has 8 bits: products err by 0.4 %, and gradients, sums of many, point the same way."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(16, 9, 84, 84), dtype=np.uint8)
    batch = (
        images,
        rng.uniform(-1, 1, (16, 4)).astype(np.float32),
        rng.standard_normal(16),
        np.full(16, 0.97),
        images[::-1].copy(),
    )
    losses, gradients, outputs = [], [], []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        agent = DrQV2((9, 84, 84), (4,), hidden_dim=64, precision=precision)
        with torch.no_grad():
            outputs.append(agent.encoder(torch.as_tensor(images)))
        losses.append(agent.update(batch, 0))
        gradients.append(
            torch.cat(
                [
                    p.grad.flatten()
                    for p in (*agent.encoder.parameters(), *agent.critic.parameters())
                ]
            )
        )
        assert (
            all(p.dtype == torch.float32 for p in agent.encoder.parameters())
            and outputs[-1].dtype == torch.float32
        )
    assert 0 < (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 0.02
    for name in (
        "critic_loss",
        "q",
    ):  # the actor's is that of a critic after Adam's first step, which knows signs only
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.01, abs=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98 and gradients[1].norm() / gradients[
        0
    ].norm() == pytest.approx(1.0, rel=0.05)


def test_encoder_learns_from_the_critic_only(monkeypatch):
    # Without shift, noise and steps, the encoder's gradient after an update must be that of the critic's loss alone.
    torch.manual_seed(0)
    monkeypatch.setattr("drqv2.random_shift", lambda images: images)
    agent = DrQV2((9, 84, 84), (4,), hidden_dim=32, std=(0.0, 0.0, 1))
    assert agent.encoder(torch.zeros(1, 9, 84, 84)).shape == (1, 32 * 35 * 35)
    agent.critic_opt.step = agent.actor_opt.step = lambda: None
    rng = np.random.default_rng(0)
    batch = (
        rng.integers(0, 256, (4, 9, 84, 84), dtype=np.uint8),
        rng.uniform(-1, 1, (4, 4)).astype(np.float32),
        rng.random(4),
        np.full(4, 0.9),
        rng.integers(0, 256, (4, 9, 84, 84), dtype=np.uint8),
    )
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
    monkeypatch.setattr(
        "drqv2.truncated_normal",
        lambda mean, std, clip=None: noises.append((std, clip)) or real(mean, std, clip),
    )
    real_min = torch.min
    monkeypatch.setattr(torch, "min", lambda *args: taken.append(args) or real_min(*args))
    agent = DrQV2((9, 84, 84), (1,), hidden_dim=8, std=(1.0, 0.5, 100))
    obs = np.zeros((2, 9, 84, 84), np.uint8)
    agent.update((obs, np.zeros((2, 1)), np.zeros(2), np.ones(2), obs + 1), 50)
    assert len(shifted) == 2 and shifted[1].max() == 1  # obs and next_obs
    assert noises == [(0.75, 0.3), (0.75, 0.3)]  # target's action and actor's
    assert len(taken) == 2 and all(len(pair) == 2 for pair in taken)
    noises.clear()
    agent.act(obs[0], 50)
    assert noises == [(0.75, None)]  # exploration is not clipped
    with pytest.raises(ValueError, match="begin"):
        ReplayBuffer(9, (1,), (1,)).add([0], [0], 0.0, False, False)


def test_targets_follow_slowly_and_states_round_trip():
    torch.manual_seed(0)
    agent = DrQV2((3,), (2,), hidden_dim=16, lr=1e-2, tau=0.1, std=(0.0, 0.0, 1), average=0.1)
    rng = np.random.default_rng(0)
    batch = (
        rng.random((8, 3)),
        rng.uniform(-1, 1, (8, 2)),
        rng.random(8),
        np.full(8, 0.9),
        rng.random((8, 3)),
    )
    old = [p.clone() for p in agent.critic_target.parameters()]
    agent.update(batch, 0)
    for target, before, critic in zip(
        agent.critic_target.parameters(), old, agent.critic.parameters()
    ):
        torch.testing.assert_close(target, 0.9 * before + 0.1 * critic)
    other = DrQV2((3,), (2,), hidden_dim=16, lr=1e-2, tau=0.1, std=(0.0, 0.0, 1), average=0.1)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for explore in (True, False):  # the actor itself and its average
        np.testing.assert_array_equal(
            other.act(np.ones(3), 0, explore), agent.act(np.ones(3), 0, explore)
        )
    assert (agent.act(np.ones(3), 0) != agent.act(np.ones(3), 0, explore=False)).any()
    # Learning goes on as if nothing had happened: slow copies and optimisers are where they were.
    for step in range(3):
        torch.manual_seed(step)
        expected = agent.update(batch, 0)
        torch.manual_seed(step)
        assert other.update(batch, 0) == expected
    for part in DrQV2.PARTS[:-2]:
        for mine, its in zip(getattr(other, part).parameters(), getattr(agent, part).parameters()):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("obs_shape", [(3,), (3, 84, 84)])
def test_a_reset_agent_is_a_new_one_behind_the_same_encoder(obs_shape):
    torch.manual_seed(0)
    agent = DrQV2(obs_shape, (2,), hidden_dim=8, feature_dim=4, lr=0.01, average=0.5)
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 255, (2, 4, *obs_shape)).astype(np.uint8 if agent.pixels else np.float32)
    batch = (obs[0], rng.uniform(-1, 1, (4, 2)), rng.random(4), np.ones(4), obs[1])
    agent.update(batch, 0)
    before = copy.deepcopy(agent.state_dict())
    torch.manual_seed(1)
    agent.reset()
    after = agent.state_dict()
    assert (
        after["actor_opt"]["state"] == after["critic_opt"]["state"] == {}
    )  # Adam's averages are gone
    assert all(
        torch.equal(after["encoder"][name], value) for name, value in before["encoder"].items()
    )
    for one, other, prefix in (
        ("actor", "greedy", "1."),
        ("critic", "critic_target", ""),
        ("encoder", "greedy", "0."),
    ):
        weights = [
            name for name in after[one] if name.endswith("weight") and after[one][name].ndim == 2
        ]
        assert (one == "encoder" or weights) and not any(
            torch.equal(after[one][name], before[one][name]) for name in weights
        )
        assert all(
            torch.equal(after[one][name], after[other][prefix + name]) for name in after[one]
        )
    start = copy.deepcopy(after)
    agent.update(batch, 0)  # and it is the new networks, with the encoder, that learn
    for part in ("actor", "critic", "greedy", "critic_target", *["encoder"] * agent.pixels):
        assert any(
            not torch.equal(value, start[part][name])
            for name, value in agent.state_dict()[part].items()
        ), part


def test_a_buffer_is_saved_piece_by_piece_and_goes_on_as_it_was():
    def pair():
        return ReplayBuffer(60, (2,), (1,), n_features=2, nstep=2, seed=3)

    buffer, file, pieces, since = pair(), io.BytesIO(), [], 0
    for lengths in ([4, 6], [], [3, 1, 5]):
        fill(buffer, lengths, first=since)
        buffer.begin(np.array([-1.0, 0.0]))  # an episode that has just begun is not saved
        end = buffer.save(file, since)
        pieces.append((since, end))
        since = end
    buffer.relabel(lambda features: 7 * features[:, 0])
    buffer.save(file, 0, ("reward",))
    other = pair()
    file.seek(0)
    for start, end in pieces:
        other.load(file, start, end)
    other.load(file, 0, since, ("reward",))
    other.begin(np.array([-1.0, 0.0]))
    assert len(other) == len(buffer) == 19 and other.rows == buffer.rows
    for b in (buffer, other):
        fill(b, [8], first=50)
    for mine, its in zip(other.sample(50), buffer.sample(50)):
        np.testing.assert_array_equal(mine, its)
    for mine, its in zip(other.episodes(), buffer.episodes(), strict=True):
        np.testing.assert_array_equal(mine, its)
    with pytest.raises(ValueError, match="raise capacity"):
        for _ in range(4):
            fill(buffer, [10])
        buffer.save(file, since)
    with pytest.raises((ValueError, EOFError)):
        pair().load(io.BytesIO(b"nonsense"), 0, 3)
    with pytest.raises(ValueError, match="begin"):
        buffer.add([0.0], np.zeros(2), 0.0, False, False, [0, 0])
