"""Data that one meaning serves in both backends: captioned scenes made from a seed."""

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene

__all__ = ["BACKGROUNDS", "LEVELS", "Scene", "make_scene"]
