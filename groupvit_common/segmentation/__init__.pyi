from .options import SegmentationOptions as SegmentationOptions
from .result import Segmentation as Segmentation
