"""DrQ-v2 (Yarats, Fergus, Lazaric & Pinto, 2021, arXiv:2107.09645): off-policy control from pixels or states.

Needs torch and numpy only, and knows nothing of rewards beyond numbers.

    agent = DrQV2(obs_shape=(21,), action_shape=(4,))
    buffer = ReplayBuffer(100_000, obs_shape=(21,), action_shape=(4,))
    buffer.begin(obs)
    action = agent.act(obs, step)
    buffer.add(action, next_obs, reward, terminated, truncated)
    agent.update(buffer.sample(256), step)

Observations of three dimensions are stacks of frames and get the paper's encoder and random shift. Observations
of one dimension are states and get neither; the rest of the algorithm is the same.

What differs from the authors' code (github.com/facebookresearch/drqv2):
- An n-step return stops at the end of its episode, with fewer steps and a bootstrap from the last observation; theirs samples
  only starts that have n steps left. Timeouts bootstrap, terminations do not.
- Nothing repeats actions, and the first frames, explored at random, are the caller's business.
- One schedule of the exploration noise, linear; steps are environment steps, not frames.
- `saturation` and `average` of DrQV2, off by default, are not in the paper.
"""

import copy
import math
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def linear_schedule(step: float, start: float, end: float, duration: float) -> float:
    """σ(t) = start + (end − start)·min(t / duration, 1): the exploration noise, paper section 3.1."""
    return start + (end - start) * min(step / duration, 1.0)


def random_shift(images: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Shifts each image by up to ±`pad` whole pixels at random, edges repeated.

    images: (B, C, H, W) of any type with H = W. Returns the same shape and type, channels last in memory. The authors draw
    the same shifts and interpolate between pixels where nothing lies between; a gather copies each byte once.
    """
    batch, _, height, width = images.shape
    if height != width:
        raise ValueError(f"random_shift needs square images, got {height}x{width}")
    shift = torch.randint(0, 2 * pad + 1, (batch, 2), device=images.device) - pad
    columns, rows = (torch.arange(height, device=images.device) + shift.T[:, :, None]).clamp(0, height - 1)
    which = torch.arange(batch, device=images.device)
    return images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def truncated_normal(mean: torch.Tensor, std: float, clip: float | None = None) -> torch.Tensor:
    """A sample of N(mean, std²) clamped to (−1, 1), its noise clamped to ±clip where clip is given.

    The clamp to (−1, 1) passes gradients straight through to `mean`, so a saturated actor can still move.
    """
    noise = torch.randn_like(mean) * std
    if clip is not None:
        noise = noise.clamp(-clip, clip)
    action = mean + noise
    return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()


def init_weights(module):
    """Orthogonal weights and zero biases, with the gain of a ReLU for convolutions (as the authors initialise)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        gain = nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else 1.0
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """3×3 convolutions of 32 channels, one per stride: (B, C, 84, 84) bytes to (B, 39200) floats with strides 2, 1, 1, 1."""

    def __init__(self, obs_shape, strides=(2, 1, 1, 1), precision=torch.float32):
        super().__init__()
        self.precision, layers = precision, []
        for channels, stride in zip((obs_shape[0], 32, 32, 32), strides, strict=True):
            layers += [nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)]
        self.convnet = nn.Sequential(*layers)
        self.apply(init_weights)
        # So, a CPU's convolutions take two thirds of the time.
        self.convnet.to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.out_dim = self(torch.zeros(1, *obs_shape)).shape[1]

    def forward(self, images):
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.convnet(images.div_(255.0).sub_(0.5)).float().flatten(1)


def trunk(in_dim, feature_dim):
    return nn.Sequential(nn.Linear(in_dim, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def mlp(in_dim, hidden_dim, out_dim):
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                         nn.Linear(hidden_dim, out_dim))


class Actor(nn.Module):
    """π_φ: the mean of a truncated normal over actions, in (−1, 1)."""

    def __init__(self, in_dim, action_dim, feature_dim, hidden_dim):
        super().__init__()
        self.trunk = trunk(in_dim, feature_dim)
        self.policy = mlp(feature_dim, hidden_dim, action_dim)
        self.apply(init_weights)

    def preactivation(self, h):
        """What goes into the tanh, (B, A): large values saturate it and stop its gradient."""
        return self.policy(self.trunk(h))

    def forward(self, h):
        return torch.tanh(self.preactivation(h))


class Critic(nn.Module):
    """Q_θ1 and Q_θ2 over a shared trunk, for clipped double Q-learning."""

    def __init__(self, in_dim, action_dim, feature_dim, hidden_dim):
        super().__init__()
        self.trunk = trunk(in_dim, feature_dim)
        self.q1 = mlp(feature_dim + action_dim, hidden_dim, 1)
        self.q2 = mlp(feature_dim + action_dim, hidden_dim, 1)
        self.apply(init_weights)

    def forward(self, h, action):
        h = torch.cat([self.trunk(h), action], dim=-1)
        return self.q1(h), self.q2(h)


class DrQV2:
    """The agent: encoder f_ξ (pixels only), actor π_φ, critics Q_θ and their slow copy.

    The defaults are the paper's for pixels; for states `hidden_dim` may be smaller and `lr` larger.
    std is (start, end, duration in steps) of the exploration schedule; noise_clip is c of equations 1 and 2.

    saturation, not in the paper: weight of the actor's mean squared pre-activation in its loss. Once the tanh is
    saturated no reward moves the actor any more; DDPG has the same trouble, and Andrychowicz et al. (2017, Hindsight
    Experience Replay, appendix A) add the square of the pre-activations to its cost. 0 is DrQ-v2 as published.

    average, not in the paper either: the greedy policy is a running average of the encoder's and the actor's weights (Polyak
    & Juditsky, 1992), which follows them at this rate per update and wavers less from one evaluation to the next. It never
    enters training. 1 is encoder and actor themselves, as published.

    strides are the encoder's. With 2, 2, 1, 1 an update takes less than half the time, and the critics see a fifth of the features.

    precision is that of the convolutions, what they give and their gradients; parameters, their optimiser and all that follows stay
    in float32. torch.bfloat16 takes a third to half off an update's time on processors that have it. (In float32 too an NVIDIA
    GPU rounds what it multiplies there to TF32's 10 bits, unless torch.backends.cudnn.allow_tf32 is False.)
    """

    PARTS = ("encoder", "actor", "greedy", "critic", "critic_target", "actor_opt", "critic_opt")

    def __init__(self, obs_shape: tuple[int, ...], action_shape: tuple[int], device: str = "cpu", lr: float = 1e-4,
                 feature_dim: int = 50, hidden_dim: int = 1024, tau: float = 0.01, std: tuple = (1.0, 0.1, 100_000),
                 noise_clip: float = 0.3, saturation: float = 0.0, average: float = 1.0, strides: tuple = (2, 1, 1, 1),
                 precision: torch.dtype = torch.float32):
        self.device, self.lr, self.tau, self.std, self.noise_clip = torch.device(device), lr, tau, std, noise_clip
        self.saturation, self.average = saturation, average
        self.pixels = len(obs_shape) == 3
        self.encoder = (Encoder(obs_shape, strides, precision) if self.pixels else nn.Identity()).to(self.device)
        self.head = (self.encoder.out_dim if self.pixels else obs_shape[0], action_shape[0], feature_dim, hidden_dim)
        self.reset()

    def reset(self) -> None:
        """Fresh actor, critics and optimisers behind the encoder, which stays; they learn anew from the replay buffer.

        A network that has long been fitted to early, useless data learns badly from better data later (Nikishin et al., 2022,
        The Primacy Bias in Deep Reinforcement Learning).
        """
        self.actor = Actor(*self.head).to(self.device)
        self.critic = Critic(*self.head).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        policy = nn.Sequential(self.encoder, self.actor)
        self.greedy = copy.deepcopy(policy).requires_grad_(False)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=self.lr, fused=True)
        # One optimiser for both: the encoder learns from the critic's loss and from nothing else.
        self.critic_opt = torch.optim.Adam([*self.encoder.parameters(), *self.critic.parameters()], lr=self.lr, fused=True)
        self.averages = [([*slow.parameters()], [*fast.parameters()], rate) for slow, fast, rate in (
            (self.critic_target, self.critic, self.tau), (self.greedy, policy, self.average))]

    @torch.no_grad()
    def act(self, obs: np.ndarray, step: int, explore: bool = True) -> np.ndarray:
        """Action (A,) in [−1, 1] as float32 for one observation; `explore=False` is the greedy policy."""
        obs = torch.as_tensor(obs, device=self.device).float().unsqueeze(0)
        if explore:
            action = truncated_normal(self.actor(self.encoder(obs)), linear_schedule(step, *self.std))
        else:
            action = self.greedy(obs)
        return action[0].cpu().numpy()

    def update(self, batch: tuple, step: int) -> dict[str, float]:
        """One gradient step for critic and encoder (equation 1), actor (equation 2) and target (EMA).

        batch: numpy arrays (obs, action, reward, discount, next_obs) as `ReplayBuffer.sample` gives them.
        Returns a dict of floats: critic_loss, actor_loss, q (mean of Q_θ1 over the batch). Raises FloatingPointError
        where a loss is not finite: the networks are lost then.
        """
        obs, action, reward, discount, next_obs = (torch.as_tensor(a, device=self.device) for a in batch)
        obs, next_obs = map(random_shift if self.pixels else torch.Tensor.float, (obs, next_obs))
        action, reward, discount = action.float(), reward.float().unsqueeze(1), discount.float().unsqueeze(1)
        std = linear_schedule(step, *self.std)

        h = self.encoder(obs)
        with torch.no_grad():
            next_h = self.encoder(next_obs)
            next_action = truncated_normal(self.actor(next_h), std, self.noise_clip)
            y = reward + discount * torch.min(*self.critic_target(next_h, next_action))
        q1, q2 = self.critic(h, action)
        critic_loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        self.critic_opt.zero_grad(set_to_none=True)
        critic_loss.backward()
        self.critic_opt.step()

        h = h.detach()
        u = self.actor.preactivation(h)
        q = torch.min(*self.critic(h, truncated_normal(torch.tanh(u), std, self.noise_clip)))
        actor_loss = self.saturation * u.square().mean() - q.mean()
        self.actor_opt.zero_grad(set_to_none=True)
        actor_loss.backward(inputs=self.actor_opt.param_groups[0]["params"])      # it flows through Q, not into it
        self.actor_opt.step()

        with torch.no_grad():
            for slow, fast, rate in self.averages:
                torch._foreach_lerp_(slow, fast, rate)
        losses = {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item(), "q": q1.mean().item()}
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"the losses are no longer numbers: {losses}")
        return losses

    def state_dict(self) -> dict:
        """Everything that learning goes on from: the networks' and the optimisers' states."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave to an agent of the same shapes."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


class ReplayBuffer:
    """Whole episodes in preallocated arrays, as a ring of `capacity` rows; n-step batches without a Python loop.

    Row k of an episode holds the observation o_k and what followed it: action, features, reward. Its last
    observation takes a row of its own, so each frame is stored once; a stack of frames (the channels of the
    newest `obs_shape[0] // frame_stack`) is put together again when it is sampled, repeating an episode's first
    frame before its start. Episodes can be sampled once they have ended.

    With n_features > 0 each transition also keeps that many named numbers, so that `relabel` can recompute every
    reward under a new reward function.
    """

    ROWS = ("obs", "action", "features", "reward", "first", "last", "terminal", "acted", "startable")

    def __init__(self, capacity: int, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], n_features: int = 0,
                 obs_dtype=np.float32, frame_stack: int = 1, nstep: int = 3, discount: float = 0.99, seed: int = 0):
        self.capacity, self.nstep, self.discount, self.frame_stack = capacity, nstep, discount, frame_stack
        self.channels = obs_shape[0] // frame_stack
        self.obs = np.zeros((capacity, self.channels, *obs_shape[1:]), obs_dtype)
        self.action = np.zeros((capacity, *action_shape), np.float32)
        self.features = np.zeros((capacity, n_features))
        self.reward = np.zeros(capacity)
        # Rows are counted without end and stored modulo `capacity`, so that `first` and `last` need no wrapping.
        self.rows, self.episode_start = 0, None
        self.first = np.zeros(capacity, np.int64)         # the episode's first row
        self.last = np.zeros(capacity, np.int64)          # the row of its last observation
        self.terminal = np.zeros(capacity, bool)          # that row ended the episode for good: no bootstrapping
        self.acted = np.zeros(capacity, bool)             # a transition leaves this row
        self.startable = np.zeros(capacity, bool)         # ... and may be sampled: it has ended, its frames are here
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Number of transitions that can be sampled."""
        return int(self.startable.sum())

    def begin(self, obs: np.ndarray) -> None:
        """Starts an episode with its first observation; an unfinished one before it is never sampled."""
        self.episode_start = self.rows
        self._write(obs)

    def add(self, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool, truncated: bool,
            features=()) -> None:
        """Appends one transition. Raises ValueError unless `begin` has come first, and for an episode longer than the buffer."""
        if self.episode_start is None:
            raise ValueError("call begin(obs) with the episode's first observation before add()")
        row = (self.rows - 1) % self.capacity
        self.action[row], self.reward[row], self.features[row] = action, reward, features
        self.acted[row] = True
        self._write(next_obs)
        if terminated or truncated:
            rows = np.arange(self.episode_start, self.rows) % self.capacity
            self.last[rows], self.terminal[rows[-1]] = self.rows - 1, terminated
            self.startable[rows[:-1]] = True
            self.episode_start = None

    def _write(self, obs):
        if self.rows - self.episode_start >= self.capacity:
            raise ValueError(f"an episode does not fit into a buffer of {self.capacity} rows: raise capacity")
        row = self.rows % self.capacity
        self.obs[row] = obs[-self.channels:]
        self.first[row], self.terminal[row], self.acted[row] = self.episode_start, False, False
        # What stood here was the oldest row; the rows right after it may have lost a frame of their stack.
        self.startable[(row + np.arange(self.frame_stack)) % self.capacity] = False
        self.rows += 1

    def _stack(self, rows):
        if self.frame_stack == 1:
            return self.obs[rows % self.capacity]
        back = rows[:, None] - np.arange(self.frame_stack - 1, -1, -1)
        frames = self.obs[np.maximum(back, self.first[rows % self.capacity][:, None]) % self.capacity]
        return frames.reshape(len(rows), -1, *frames.shape[3:])

    def sample(self, batch_size: int) -> tuple[np.ndarray, ...]:
        """A uniform batch: obs (B, ...), action (B, A), reward (B,), discount (B,), next_obs (B, ...).

        reward is Σ_{k<m} γ^k r_{t+k} and discount γ^m with m = min(n, steps left in the episode), so a return
        never crosses an episode; discount is 0 where the m steps reach a termination, and stays γ^m at a timeout,
        through which the value bootstraps. Raises ValueError when no episode has ended yet.
        """
        if not self.startable.any():
            raise ValueError("nothing to sample: no episode has ended yet")
        filled, slots = min(self.rows, self.capacity), np.empty(0, np.int64)
        while len(slots) < batch_size:      # rejects the few rows that no transition leaves
            draw = self.rng.integers(filled, size=batch_size)
            slots = np.concatenate([slots, draw[self.startable[draw]]])
        slots = slots[:batch_size]
        # The row that is stored in a slot: the newest number that is congruent to it.
        rows = self.rows - 1 - (self.rows - 1 - slots) % self.capacity
        m = np.minimum(self.nstep, self.last[slots] - rows)
        k = np.arange(self.nstep)
        rewards = self.reward[(rows[:, None] + k) % self.capacity] * (k < m[:, None])
        end = rows + m
        discount = self.discount ** m * ~self.terminal[end % self.capacity]
        reward = rewards @ self.discount ** k
        return self._stack(rows), self.action[slots], reward.astype(np.float32), discount.astype(np.float32), self._stack(end)

    def relabel(self, reward_fn: Callable[[np.ndarray], np.ndarray]) -> None:
        """Recomputes every stored reward in one call: reward_fn maps features (N, F) to rewards (N,)."""
        rows = np.flatnonzero(self.acted)
        self.reward[rows] = reward_fn(self.features[rows])

    def episodes(self) -> list[np.ndarray]:
        """Features (T, F) of each complete episode that is still held in full, oldest first."""
        ends = np.flatnonzero(self.startable)
        firsts = np.unique(self.first[ends])
        firsts = firsts[firsts >= self.rows - self.capacity]
        return [self.features[np.arange(f, self.last[f % self.capacity]) % self.capacity] for f in firsts]

    def save(self, file: BinaryIO, since: int, names: tuple[str, ...] = ROWS) -> int:
        """Appends the rows `since` and later of all episodes that have ended to a binary file, one array after the other.

        names: of the arrays, ROWS or some of them. Returns the number of the first row that was not saved, for the next time:
        ended episodes never change, but for `relabel`. Raises ValueError once rows have been overwritten.
        """
        end = self.rows if self.episode_start is None else self.episode_start
        if self.rows > self.capacity:
            raise ValueError(f"more rows than the buffer's {self.capacity} have been written: raise capacity to save it")
        for name in names:
            np.save(file, getattr(self, name)[since:end], allow_pickle=False)
        return end

    def load(self, file: BinaryIO, since: int, end: int, names: tuple[str, ...] = ROWS) -> None:
        """Reads back what one `save` wrote, rows `since` to `end` (exclusive); the next episode starts with `begin`.

        Raises ValueError where the file holds something else, or more than fits.
        """
        for name in names:
            rows = np.load(file, allow_pickle=False)
            getattr(self, name)[since:end] = rows.reshape(end - since, *getattr(self, name).shape[1:])
        self.rows = max(self.rows, end)
