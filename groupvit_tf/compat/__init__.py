"""Habits of transformers' models that programs rely on and our own code does not (see `groupvit_common.compat`)."""
