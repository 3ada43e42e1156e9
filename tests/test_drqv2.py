"""The buffer against a slow one, the agent against the equations of DrQ-v2 written out again."""

import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import example, run_alone

import drqv2
from drqv2 import DrQV2, Episode, ReplayBuffer, policy, random_shift, rollout


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def small(obs_shape=(3,), seed=0, **values):
    torch.manual_seed(seed)
    return DrQV2(obs_shape, (2,), **{"lr": 1e-2, "hidden_dim": 8, **values})


def batch_of(rng, obs_shape=(3,)):
    obs = rng.integers(0, 256, (2, 16, *obs_shape), dtype=np.uint8)
    if len(obs_shape) == 1:
        obs = rng.standard_normal(obs.shape, np.float32)
    action = rng.uniform(-1, 1, (16, 2)).astype(np.float32)
    reward, discount = rng.standard_normal((16, 1), np.float32), rng.random((16, 1), np.float32)
    return obs[0], action, reward, discount, obs[1]


def lived(number, length, terminated=False, pixels=False):
    """An episode whose observations and features are (its number, step)."""
    obs = np.stack([np.full(length + 1, number), np.arange(length + 1)], 1)
    features, action = obs[:-1].astype(float), np.full((length, 1), number / 100, np.float32)
    if pixels:
        obs = obs[:, [0, 1, 1], None, None] + np.zeros((1, 1, 2, 2))
    obs = obs.astype(np.uint8 if pixels else np.float32)
    return Episode(obs, action, features, np.zeros(length), terminated, False)


@pytest.mark.parametrize("pixels", [False, True])
def test_ring_slow_twin(pixels):
    # Checked after each of many episodes, so that the oldest row is every row of an episode once.
    rng, shape = np.random.default_rng(0), (9, 2, 2) if pixels else (2,)
    buffer = ReplayBuffer(37, shape, (1,), 2, nstep=3, discount=0.9)
    assert buffer.obs.nbytes == 37 * (3 * 2 * 2 if pixels else 2 * 4)  # each frame once
    rows, episodes = [], []
    for number in range(60):
        length = int(rng.integers(1, 12))
        episodes.append(lived(number, length, bool(rng.random() < 0.5), pixels))
        if number % 2:
            buffer.add(episodes[-1], 10.0 * number + np.arange(length))
        else:
            buffer.add(episodes[-1], np.zeros(length))
            buffer.relabel(lambda features: features @ [10.0, 1.0])
        rows += [(number, t) for t in range(length + 1)]
        held = {(n, t) for n, t in rows[-37:] if t < len(episodes[n])}
        # Of the two oldest rows, frames may be lost.
        spared = set(rows[-37:][:2]) if pixels and len(rows) > 35 else set()
        found, batch = set(), buffer.sample(500, rng)
        assert [array.shape[1:] for array in batch] == [shape, (1,), (1,), (1,), shape]
        assert {array.dtype.str for array in batch[1:4]} == {"<f4"}
        for obs, action, reward, discount, next_obs in zip(*batch):
            n, t = map(int, obs[-3:-1, 0, 0] if pixels else obs)
            found.add((n, t))
            m, gamma = min(3, len(episodes[n]) - t), 0.9 ** np.arange(4)
            for got, step in ((obs, t), (next_obs, t + m)):
                steps = np.maximum([step - 2, step - 1, step], 0) if pixels else step
                assert (got.reshape(-1) == episodes[n].obs[steps].reshape(-1)).all()
            ended = episodes[n].terminated and t + m == len(episodes[n])
            assert abs(reward - gamma[:m] @ (10 * n + t + np.arange(m))) < 1e-3
            assert abs(discount - (0.0 if ended else gamma[m])) < 1e-6
            assert action == episodes[n].action[t]
        assert found - spared == held - spared and found <= held


def test_sample_uniform():
    buffer = ReplayBuffer(100, (2,), (1,), 2)
    for number, length in enumerate((1, 5, 3)):
        buffer.add(lived(number, length), np.zeros(length))
    obs, same = (buffer.sample(9000, np.random.default_rng(0))[0] for _ in "12")
    _, counts = np.unique(obs, axis=0, return_counts=True)
    assert len(counts) == 9 and counts.min() > 850 and counts.max() < 1150 and (obs == same).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("obs", np.zeros((5, 9, 2, 2), np.uint8)),  # whole stacks
        ("obs", np.zeros((4, 3, 2, 2), np.uint8)),  # the last is missing
        ("obs", np.zeros((5, 3, 2, 2))),  # floats do not become bytes
        ("features", np.zeros((4, 3))),
        ("action", np.zeros((4, 2), np.float32)),
    ],
)
def test_buffer_refuses(name, value):
    buffer, episode = ReplayBuffer(10, (9, 2, 2), (1,), 2), lived(2, 4, pixels=True)
    buffer.add(lived(1, 4, pixels=True), np.zeros(4))
    setattr(episode, name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value.shape}, {value.dtype};")):
        buffer.add(episode, np.zeros(4))
    assert set(buffer.sample(99, np.random.default_rng(0))[0][:, -3, 0, 0]) == {1}


def test_longest_episode():
    buffer = ReplayBuffer(10, (2,), (1,), 2)
    buffer.add(lived(1, 9), np.zeros(9))
    with pytest.raises(ValueError, match="at most 10 rows"):
        buffer.add(lived(2, 10), np.zeros(10))
    assert set(buffer.sample(99, np.random.default_rng(0))[0][:, 0]) == {1}


class Line:
    """Writes each observation, the number of the step, into one array, and over the action."""

    def __init__(self, length=4, terminated=False, pixels=False, **bad):
        self.length, self.terminated, self.bad = length, terminated, bad
        self.obs = np.zeros((9, 2, 2), np.uint8) if pixels else np.zeros(3, np.float32)

    def reset(self, seed):
        self.t, self.seed, self.obs[:] = 0, seed, 0
        return self.obs, {}

    def step(self, action):
        self.t += 1
        self.obs[:-3], self.obs[-3:] = self.obs[3:].copy(), self.t
        found = {"a": self.t, "b": 10 * self.t, "reward": action[0], "obs": self.t}
        if self.t == 2:
            found.update(self.bad)
        self.obs[-1] = found["obs"]
        action[:] = 9
        names = ["a", "b"] if self.t % 2 else ["b", "a"]
        features = {name: found[name] for name in names if found[name] is not None}
        info = {"features": features, "success": self.t in (2, self.bad.get("success"))}
        over = self.t == self.length
        return self.obs, found["reward"], over and self.terminated, over, info


def act(obs):
    return np.array([obs.flat[-1] / 8 - 0.5])


@pytest.mark.parametrize("terminated", [False, True])
def test_rollout(terminated):
    env = Line(terminated=terminated)
    episode = rollout(env, act, seed=7, names=("b", "a"), limit=4)
    assert env.seed == 7 and len(episode) == 4
    np.testing.assert_array_equal(episode.obs, np.arange(5)[:, None] * np.ones(3))
    np.testing.assert_array_equal(episode.action, np.arange(4)[:, None] / 8 - 0.5)
    np.testing.assert_array_equal(episode.reward, episode.action[:, 0])
    assert episode.features.tolist() == [[10, 1], [20, 2], [30, 3], [40, 4]]  # whatever their order
    assert episode.terminated is terminated and episode.success is False
    assert rollout(Line(success=4), act, seed=7, names=("a",)).success is True  # of the last step
    pixels = rollout(Line(pixels=True), act, seed=0)
    assert pixels.obs.dtype == np.uint8 and pixels.action.dtype == np.float32
    np.testing.assert_array_equal(pixels.obs, np.arange(5)[:, None, None, None] + 0 * pixels.obs)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"a": np.nan}, "features"),
        ({"b": np.inf}, "features"),
        ({"obs": np.nan}, "obs"),
        ({"reward": -np.inf}, "reward"),
        ({"reward": 1e39}, "single precision"),
        ({"b": None}, r"info\['features'\].* lacks b$"),
        ({"length": 6}, "more than 5 steps"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_rollout_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        rollout(Line(**bad), act, seed=0, names=("a", "b"), limit=5)


def test_policy():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    network[0].weight.data.zero_()
    network[0].bias.data.copy_(torch.tensor([0.0, 0.5]))
    greedy, explore = policy(network), policy(network, 0.5, np.random.default_rng(0))
    np.testing.assert_allclose(greedy(np.ones(2)), np.tanh([0.0, 0.5]), rtol=1e-6)
    noise = np.random.default_rng(0).standard_normal((50, 2), np.float32)
    expected = np.clip(np.tanh([0.0, 0.5]) + 0.5 * noise, -1.0, 1.0)
    assert np.abs(expected).max() == 1.0
    np.testing.assert_allclose([explore(np.ones(2)) for _ in noise], expected, rtol=1e-4)


def test_random_shift(pad=2):
    # The pixels are numbered, so an image shows its shift; its channels keep together.
    n, image = 2 * pad + 1, torch.arange(288, dtype=torch.int16).reshape(2, 12, 12)
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    windows = [padded[:, y : y + 12, x : x + 12] for y in range(n) for x in range(n)]
    counts = {window.tobytes(): 0 for window in windows}
    for shifted in random_shift(image.repeat(100 * n * n, 1, 1, 1), chance(), pad).numpy():
        counts[shifted.tobytes()] += 1
    assert min(counts.values()) > 50 and max(counts.values()) < 150


def test_noise():
    values = [drqv2.linear_schedule(step, 1.0, 0.1, 100) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])
    mean = torch.tensor([-1.0, 0.0, 0.99]).repeat(2000, 1).requires_grad_()
    sample = drqv2.truncated_normal(mean, 1.0, chance())
    assert sample.abs().max() < 1 and (sample - mean).abs().max() <= 0.3 + 1e-6
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))


def trunk(p, name, x):
    x = F.linear(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"])
    x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, False, keepdim=True) + 1e-5)
    return torch.tanh(x * p[f"{name}.1.weight"] + p[f"{name}.1.bias"])


def head(p, name, x):
    for layer in (0, 2, 4):
        x = torch.clamp(x, min=0) if layer else x
        x = F.linear(x, p[f"{name}.{layer}.weight"], p[f"{name}.{layer}.bias"])
    return x


def both_q(p, h, action):
    x = torch.cat([trunk(p, "trunk", h), action], 1)
    return head(p, "q1", x), head(p, "q2", x)


def noisy(action, std, generator):
    action = action + torch.clamp(std * torch.randn(action.shape, generator=generator), -0.3, 0.3)
    return action + (torch.clamp(action, -1 + 1e-6, 1 - 1e-6) - action).detach()


def encoded(p, x, strides):
    """States stay what they are."""
    x = x / 255 - 0.5 if strides else x
    for layer, stride in enumerate(strides):
        weight, bias = p[f"convnet.{2 * layer}.weight"], p[f"convnet.{2 * layer}.bias"]
        x = torch.clamp(F.conv2d(x, weight, bias, stride), min=0)
    return x.reshape(len(x), -1)


def learn(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


@pytest.mark.parametrize("strides", [(), (2, 2, 1)])
def test_update_twin(strides, saturation=0.3, average=0.2):
    """Equations 1 and 2 by hand; the encoder learns from the critic's loss alone."""
    obs_shape, values = (6, 20, 20) if strides else (3,), dict(lr=1e-3, strides=strides)
    agent = small(obs_shape, saturation=saturation, average=average, **values)
    for p in [*agent.explorer.parameters(), *agent.critic.parameters()]:
        p.data.add_(0.1 * torch.randn_like(p))  # so that target, biases and pre-activations matter
    encoder, actor, critic, target = (
        {name: p.clone().requires_grad_() for name, p in net.state_dict().items()}
        for net in (agent.encoder, agent.actor, agent.critic, agent.critic_target)
    )
    critic = {**critic, **encoder}  # learn from one loss, in one optimiser
    greedy = [p.clone() for p in agent.greedy.parameters()]
    actor_opt, critic_opt = (torch.optim.Adam(p.values(), lr=1e-3) for p in (actor, critic))
    rng, ours, theirs = np.random.default_rng(0), chance(), chance()
    for _ in range(3):
        batch = batch_of(rng, obs_shape)
        losses = agent.update(batch, 0.4, ours)
        obs, action, reward, discount, next_obs = map(torch.as_tensor, batch)
        if strides:
            obs, next_obs = random_shift(obs, theirs), random_shift(next_obs, theirs)
        h, next_h = encoded(critic, obs, strides), encoded(critic, next_obs, strides)
        with torch.no_grad():
            next_action = torch.tanh(head(actor, "1", trunk(actor, "0", next_h)))
            q1, q2 = both_q(target, next_h, noisy(next_action, 0.4, theirs))
            y = reward + discount * torch.where(q1 < q2, q1, q2)
        q1, q2 = both_q(critic, h, action)
        critic_loss, q = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean(), q1.mean().item()
        learn(critic_opt, critic_loss)
        # The critic has just learnt; the encoder's output is from before.
        u = head(actor, "1", trunk(actor, "0", h.detach()))
        q1, q2 = both_q(critic, h.detach(), noisy(torch.tanh(u), 0.4, theirs))
        actor_loss = (saturation * u**2).mean() - torch.where(q1 < q2, q1, q2).mean()
        learn(actor_opt, actor_loss)
        for name in target:
            target[name] = (0.99 * target[name] + 0.01 * critic[name]).detach()
        explorer = [critic[name] for name in encoder] + [*actor.values()]
        greedy = [(1 - average) * g + average * e.detach() for g, e in zip(greedy, explorer)]
        expected = {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item(), "q": q}
        assert losses == pytest.approx(expected, abs=1e-5)
    nets = agent.encoder, agent.actor, agent.critic, agent.critic_target
    for net, twin in zip(nets, (critic, actor, critic, target)):
        for name, p in net.state_dict().items():
            torch.testing.assert_close(p, twin[name].detach(), rtol=0, atol=3e-5)
    torch.testing.assert_close([*agent.greedy.parameters()], greedy, rtol=0, atol=3e-5)


def test_initial_weights():
    agent = small((9, 84, 84))
    assert agent.actor[0][0].weight.shape == (50, 39_200)
    assert small((9, 84, 84), strides=(2, 2, 1, 1)).actor[0][0].weight.shape == (50, 8192)
    layers = [*agent.explorer.modules(), *agent.critic.modules()]
    layers = [layer for layer in layers if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 4 + 4 + 7
    for layer in layers:
        w = layer.weight.flatten(1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        gain = 2 if isinstance(layer, torch.nn.Conv2d) else 1  # a ReLU's, squared
        torch.testing.assert_close(gram, gain * torch.eye(len(gram)), rtol=0, atol=1e-4)
        assert not layer.bias.any()
    for slow, fast in ((agent.critic_target, agent.critic), (agent.greedy, agent.explorer)):
        assert all(map(torch.equal, slow.parameters(), fast.parameters()))


def test_defaults_are_the_papers():
    assert DrQV2.__init__.__defaults__ == ("cpu", 1e-4, 1024, 0.0, 1.0, (2, 1, 1, 1))
    assert ReplayBuffer.__init__.__defaults__ == (0, 3, 0.99)  # features, n and γ
    assert random_shift.__defaults__ == (4,)


def test_resumes_to_the_bit():
    def learn_on(agent, seed):
        rng, generator = np.random.default_rng(seed), chance(seed)
        return [agent.update(batch_of(rng, obs_shape), 0.1, generator) for _ in range(3)]

    obs_shape, file = (3, 20, 20), io.BytesIO()
    agent, other = small(obs_shape, average=0.1), small(obs_shape, seed=1, average=0.1)
    learn_on(agent, 0)
    torch.save(agent.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = learn_on(agent, 1)
    torch.manual_seed(9)  # every draw comes from the generator that is given
    assert learn_on(other, 1) == expected
    for part in ("explorer", "greedy", "critic", "critic_target"):
        nets = getattr(agent, part).parameters(), getattr(other, part).parameters()
        assert all(map(torch.equal, *nets))


def test_losses_must_be_finite():
    batch = batch_of(np.random.default_rng(0))
    batch[2][3] = np.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        small().update(batch, 0.1, chance())


def test_docstring_example(tmp_path):
    pytest.importorskip("gymnasium")
    program = example(drqv2)
    for episodes in ("range(50)", "range(20)"):  # which takes a minute
        assert program.count(episodes) == 1
        program = program.replace(episodes, "range(1)")
    assert -2000 < float(run_alone(drqv2, program, tmp_path)) < 0
