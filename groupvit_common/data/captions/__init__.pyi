from .settings import DataSettings as DataSettings
from .settings import SourceSettings as SourceSettings
from .stream import CaptionStream as CaptionStream
