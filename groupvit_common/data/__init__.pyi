from .captions import CaptionStream as CaptionStream
from .captions import DataSettings as DataSettings
from .captions import SourceSettings as SourceSettings
from .scenes import BACKGROUNDS as BACKGROUNDS
from .scenes import LEVELS as LEVELS
from .scenes import Scene as Scene
from .scenes import make_scene as make_scene
