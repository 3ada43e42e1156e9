"""DrQ-v2 (Yarats, Fergus, Lazaric & Pinto, 2021, arXiv:2107.09645): off-policy control.

One episode is the unit: `rollout` lives it, the buffer takes it whole, updates follow it. Needs
torch and numpy only. This learns Pendulum-v1 from states in 10,000 steps and prints about -155:

    import gymnasium, numpy as np, torch
    from drqv2 import DrQV2, ReplayBuffer, linear_schedule, policy, rollout

    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    torch.manual_seed(1)  # draws the networks' weights
    agent = DrQV2(obs_shape=(3,), action_shape=(1,), lr=1e-3, hidden_dim=64)
    buffer = ReplayBuffer(20_000, obs_shape=(3,), action_shape=(1,), nstep=1)
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    for n in range(50):
        std = linear_schedule(200 * n, start=1.0, end=0.1, duration=5_000)
        episode = rollout(env, policy(agent.explorer, std, rng), seed=n)
        buffer.add(episode, episode.reward)
        for _ in range(len(episode)):
            agent.update(buffer.sample(128, rng), std, generator)
    tests = [rollout(env, policy(agent.greedy), seed=1_000 + n) for n in range(20)]
    print(np.mean([episode.reward.sum() for episode in tests]))

Seeds 1 to 4 end between -149 and -157. With the default nstep=3, seed 1 ends at -219.

Observations of three dimensions are stacks of three RGB frames; they get the paper's encoder and
random shift. Observations of one dimension are states and get neither: what remains is DDPG with
DrQ-v2's n-step returns, clipped double critics and noise schedule.

What differs from the authors' code (github.com/facebookresearch/drqv2): the last n - 1 steps of
an episode are sampled too, with shorter returns; timeouts bootstrap, terminations do not; nothing
repeats actions; `saturation` and `average` of DrQV2, off by default, are not in the paper.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FRAMES = 3  # in one observation of pixels
FEATURE_DIM = 50  # width of the trunks
TAU = 0.01  # rate at which the target critics follow
NOISE_CLIP = 0.3  # c of equations 1 and 2


@dataclass
class Episode:
    """τ, a trajectory of T steps. Of a stack of frames only the newest is kept."""

    obs: np.ndarray  # (T + 1, ...) states, or uint8 frames (T + 1, 3, H, H)
    action: np.ndarray  # (T, A) float32 in [-1, 1]
    features: np.ndarray  # (T, F) float64, named scalars of each step
    reward: np.ndarray  # (T,) float64, the environment's own
    terminated: bool  # ended for good, not by a time limit
    success: bool  # info["success"] of the last step; False without named features

    def __len__(self) -> int:
        return len(self.action)


def rollout(env, act: Callable, seed: int, names: tuple = (), limit: float = math.inf) -> Episode:
    """Lives one episode of a Gymnasium-style environment. act: maps an observation to an action.

    names: of the scalars to take from info["features"]. Raises ValueError for one that is missing,
    for numbers that are not finite, and for an episode of more than `limit` steps.
    """
    obs, _ = env.reset(seed=seed)
    newest = slice(-obs.shape[0] // FRAMES, None) if obs.ndim == 3 else slice(None)
    observations, actions, features, rewards, over = [np.array(obs[newest])], [], [], [], False
    while not over:
        actions.append(act(obs))
        obs, reward, terminated, truncated, info = env.step(actions[-1].copy())
        over = terminated or truncated
        measured = info.get("features", {})
        missing = [name for name in names if name not in measured]
        if missing:
            raise ValueError(f"info['features'] of the environment lacks {', '.join(missing)}")
        if len(actions) > limit:
            raise ValueError(f"an episode goes on for more than {limit:g} steps: truncate it")
        observations.append(np.array(obs[newest]))  # it may be the environment's own
        features.append([measured[name] for name in names])
        rewards.append(reward)
    episode = Episode(
        np.array(observations),
        np.array(actions, np.float32),
        np.array(features, float),
        np.array(rewards, float),
        bool(terminated),
        bool(info["success"]) if names else False,
    )
    for name in ("obs", "action", "features", "reward"):
        if not np.isfinite(np.float32(getattr(episode, name))).all():
            raise ValueError(f"an episode's {name} is not finite throughout, in single precision")
    return episode


def policy(network: nn.Module, std: float = 0.0, rng=None) -> Callable:
    """Maps an observation to an action (A,): the network's mean plus N(0, std²), clipped."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def act(obs):
        mean = network(torch.as_tensor(obs, device=device).float()[None])[0].cpu().numpy()
        noise = std * rng.standard_normal(mean.shape, np.float32) if std else 0.0
        return np.clip(mean + noise, -1.0, 1.0)

    return act


def linear_schedule(step: float, start: float, end: float, duration: float) -> float:
    """σ(t) = start + (end − start)·min(t / duration, 1): the exploration noise, section 3.1."""
    return start + (end - start) * min(step / duration, 1.0)


def random_shift(images: torch.Tensor, generator: torch.Generator, pad: int = 4) -> torch.Tensor:
    """Shifts each image of (B, C, H, H) by up to ±`pad` whole pixels, edges repeated.

    The authors also interpolate, which changes nothing, because the shifts are whole pixels.
    A gather copies each byte once. Returns the same shape and type, channels last in memory.
    """
    B, H, device = len(images), images.shape[-1], images.device
    shift = torch.randint(2 * pad + 1, (2, B, 1), device=device, generator=generator) - pad
    columns, rows = (torch.arange(H, device=device) + shift).clamp(0, H - 1)
    image = torch.arange(B, device=device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def truncated_normal(mean: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """A sample of N(mean, std²), its noise clamped to ±NOISE_CLIP and the sum to (−1, 1).

    The outer clamp passes gradients straight through, so a saturated actor can still move.
    """
    noise = torch.randn(mean.shape, device=mean.device, generator=generator) * std
    action = mean + noise.clamp(-NOISE_CLIP, NOISE_CLIP)
    return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()


def init_weights(module):
    """Orthogonal weights and zero biases, with the gain of a ReLU for convolutions."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        gain = nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else 1.0
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """f_ξ: 3×3 convolutions of 32 channels, one per stride. Bytes (B, C, H, H) to (B, n)."""

    def __init__(self, channels, strides):
        super().__init__()
        layers = []
        for stride in strides:
            layers += [nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)]
            channels = 32
        self.convnet = nn.Sequential(*layers)

    def forward(self, images):
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return self.convnet(images / 255.0 - 0.5).flatten(1)


def trunk(in_dim):
    return nn.Sequential(nn.Linear(in_dim, FEATURE_DIM), nn.LayerNorm(FEATURE_DIM), nn.Tanh())


def mlp(in_dim, hidden_dim, out_dim):
    first, second = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden_dim, out_dim))


class Critic(nn.Module):
    """Q_θ1 and Q_θ2 over a shared trunk, for clipped double Q-learning."""

    def __init__(self, in_dim, action_dim, hidden_dim):
        super().__init__()
        self.trunk = trunk(in_dim)
        self.q1 = mlp(FEATURE_DIM + action_dim, hidden_dim, 1)
        self.q2 = mlp(FEATURE_DIM + action_dim, hidden_dim, 1)

    def forward(self, h, action):
        h = torch.cat([self.trunk(h), action], dim=-1)
        return self.q1(h), self.q2(h)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow ← (1 − rate)·slow + rate·fast."""
    for mine, theirs in zip(slow.parameters(), fast.parameters()):
        mine.lerp_(theirs, rate)


class DrQV2:
    """The agent. Encoder f_ξ (pixels only), actor π_φ, critics Q_θ and their target.

    The defaults are the paper's, for pixels. For states take a larger lr and a smaller hidden_dim.
    `explorer` and `greedy` map observations (B, ...) to mean actions (B, A), see `policy`.

    saturation: weight in the actor's loss of its mean squared pre-activation. Once the tanh is
    saturated, no reward moves the actor (Andrychowicz et al., 2017, appendix A).
    average: the rate at which the weights of `greedy` follow those of `explorer`. A slow rate lets
    it waver less (Polyak & Juditsky, 1992). `greedy` never enters training.
    """

    PARTS = ("explorer", "greedy", "critic", "critic_target", "actor_opt", "critic_opt")

    def __init__(
        self,
        obs_shape: tuple,
        action_shape: tuple,
        device: str = "cpu",
        lr: float = 1e-4,
        hidden_dim: int = 1024,
        saturation: float = 0.0,
        average: float = 1.0,
        strides: tuple = (2, 1, 1, 1),
    ):
        self.device, self.saturation, self.average = torch.device(device), saturation, average
        self.pixels = len(obs_shape) == 3
        encoder = Encoder(obs_shape[0], strides) if self.pixels else nn.Identity()
        # With channels last, a CPU's convolutions take two thirds of the time.
        self.encoder = encoder.apply(init_weights).to(memory_format=torch.channels_last)
        in_dim, A = self.encoder(torch.zeros(1, *obs_shape)).shape[1], action_shape[0]
        # The actor gives pre-activations u; the mean action is tanh(u).
        actor = nn.Sequential(trunk(in_dim), mlp(FEATURE_DIM, hidden_dim, A))
        self.actor = actor.apply(init_weights)
        self.critic = Critic(in_dim, A, hidden_dim).apply(init_weights).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.explorer = nn.Sequential(self.encoder, self.actor, nn.Tanh()).to(self.device)
        self.greedy = copy.deepcopy(self.explorer).requires_grad_(False)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=lr, fused=True)
        # One optimiser for both, because the encoder learns from the critic's loss alone.
        parameters = [*self.encoder.parameters(), *self.critic.parameters()]
        self.critic_opt = torch.optim.Adam(parameters, lr=lr, fused=True)

    def update(self, batch: tuple, std: float, generator: torch.Generator) -> dict[str, float]:
        """One gradient step for critic and encoder (equation 1) and actor (equation 2).

        batch: what `ReplayBuffer.sample` gives. Returns critic_loss, actor_loss and q, the mean
        of Q_θ1. Raises FloatingPointError when a loss is not finite.
        """
        obs, action, reward, discount, next_obs = (
            torch.as_tensor(array, device=self.device) for array in batch
        )
        if self.pixels:
            obs, next_obs = random_shift(obs, generator), random_shift(next_obs, generator)

        h = self.encoder(obs)
        with torch.no_grad():
            next_h = self.encoder(next_obs)
            next_action = truncated_normal(self.actor(next_h).tanh(), std, generator)
            y = reward + discount * torch.min(*self.critic_target(next_h, next_action))
        q1, q2 = self.critic(h, action)
        critic_loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        h = h.detach()
        u = self.actor(h)
        q = torch.min(*self.critic(h, truncated_normal(u.tanh(), std, generator)))
        actor_loss = self.saturation * u.square().mean() - q.mean()
        self.actor_opt.zero_grad()
        actor_loss.backward(inputs=[*self.actor.parameters()])  # through Q, not into it
        self.actor_opt.step()

        follow(self.critic_target, self.critic, TAU)
        follow(self.greedy, self.explorer, self.average)
        losses = {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item()}
        losses["q"] = q1.mean().item()
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"the losses are not finite: {losses}")
        return losses

    def state_dict(self) -> dict:
        """All that learning continues from: networks and optimisers."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


class ReplayBuffer:
    """Whole episodes in a ring of `capacity` rows; n-step batches without a Python loop.

    A row holds observation o_k and what followed it: action, features, reward. The last
    observation of an episode takes a row of its own, so each frame is stored once.
    """

    def __init__(self, capacity, obs_shape, action_shape, n_features=0, nstep=3, discount=0.99):
        self.capacity, self.nstep, self.discount, self.rows = capacity, nstep, discount, 0
        self.frames = FRAMES if len(obs_shape) == 3 else 1
        shape = (capacity, obs_shape[0] // self.frames, *obs_shape[1:])
        self.obs = np.zeros(shape, np.float32 if self.frames == 1 else np.uint8)
        self.action = np.zeros((capacity, *action_shape), np.float32)
        self.features = np.zeros((capacity, n_features))
        self.reward = np.zeros(capacity)
        self.age = np.zeros(capacity, int)  # steps since the episode began
        self.left = np.zeros(capacity, int)  # steps until it ends
        self.terminal = np.zeros(capacity, bool)  # it ended here for good
        self.starts = np.zeros(0, int)  # rows in which an action was taken

    def add(self, episode: Episode, reward: np.ndarray) -> None:
        """Stores an episode with the rewards (T,) to learn from, in place of the oldest rows.

        Raises ValueError for arrays that have another shape or kind than declared.
        """
        T = len(episode)
        for name, length in (("obs", T + 1), ("action", T), ("features", T)):
            new, kept = getattr(episode, name), getattr(self, name)
            fits = new.shape == (length, *kept.shape[1:]) and T < self.capacity
            if not fits or not np.can_cast(new.dtype, kept.dtype, "same_kind"):
                takes = f"at most {self.capacity} rows of {kept.shape[1:]}, {kept.dtype}"
                raise ValueError(f"{name} is {new.shape}, {new.dtype}; the buffer takes {takes}")
        rows = (self.rows + np.arange(T + 1)) % self.capacity
        self.obs[rows], self.action[rows[:-1]] = episode.obs, episode.action
        self.features[rows[:-1]], self.reward[rows[:-1]] = episode.features, reward
        self.age[rows], self.left[rows] = np.arange(T + 1), np.arange(T, -1, -1)
        self.terminal[rows], self.terminal[rows[-1]] = False, episode.terminated
        self.rows += T + 1
        # The oldest remaining rows may lack the frames before them.
        self.left[(self.rows + np.arange(self.frames - 1)) % self.capacity] = 0
        self.starts = np.flatnonzero(self.left)

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A uniform batch: obs (B, ...), action (B, A), reward (B, 1), discount (B, 1), next_obs.

        reward is Σ_{k<m} γ^k r_{t+k}, discount is γ^m, and next_obs is o_{t+m}, with m the
        smaller of n and the steps left. discount is 0 where these steps reach a termination.
        """
        rows = self.starts[rng.integers(len(self.starts), size=batch_size)]
        m, k = np.minimum(self.nstep, self.left[rows]), np.arange(self.nstep)
        rewards = self.reward[(rows[:, None] + k) % self.capacity] * (k < m[:, None])
        reward = (rewards @ self.discount**k).astype(np.float32)
        end = (rows + m) % self.capacity
        discount = (self.discount**m * ~self.terminal[end]).astype(np.float32)
        obs, next_obs = self._stack(rows), self._stack(end)
        return obs, self.action[rows], reward[:, None], discount[:, None], next_obs

    def _stack(self, rows):
        """Observations (B, ...). An episode's first frame stands in for frames before it."""
        back = np.minimum(np.arange(self.frames - 1, -1, -1), self.age[rows][:, None])
        frames = self.obs[(rows[:, None] - back) % self.capacity]
        return frames.reshape(len(rows), -1, *frames.shape[3:])

    def relabel(self, reward_fn: Callable[[np.ndarray], np.ndarray]) -> None:
        """Computes all rewards again. reward_fn: features (N, F) to rewards (N,)."""
        self.reward[self.starts] = reward_fn(self.features[self.starts])
