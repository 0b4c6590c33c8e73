"""A model as files for other runtimes: `groupvit export`."""
