"""PandaEnv as a gymnasium.Env, for wrappers, vector environments and other libraries."""

import gymnasium

from envs import PandaEnv


class GymPanda(gymnasium.Env):
    metadata = PandaEnv.metadata

    def __init__(self, task, **kwargs):
        self.env = env = PandaEnv(task, **kwargs)
        self.render_mode = env.render_mode
        self.action_space = gymnasium.spaces.Box(*env.action_space)
        self.observation_space = gymnasium.spaces.Box(*env.observation_space)
        self.step, self.render, self.close = env.step, env.render, env.close

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.env.reset(seed=seed, options=options)
