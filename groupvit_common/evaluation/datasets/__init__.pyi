from .classification import ClassificationSet as ClassificationSet
from .classification import open_classification_set as open_classification_set
from .segmentation import SegmentationSet as SegmentationSet
from .segmentation import open_sets as open_sets
