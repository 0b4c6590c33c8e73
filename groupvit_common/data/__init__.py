"""Data that one meaning serves in both backends: captioned pictures from files, and captioned scenes made from a seed."""

from groupvit_common.data.scenes import BACKGROUNDS, LEVELS, Scene, make_scene
from groupvit_common.data.settings import DataSettings, SourceSettings

__all__ = ["BACKGROUNDS", "LEVELS", "DataSettings", "Scene", "SourceSettings", "make_scene"]
