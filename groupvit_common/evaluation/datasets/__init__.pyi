from .classification import ClassificationSet as ClassificationSet
from .classification import open_classification_set as open_classification_set
from .registry import DATASETS as DATASETS
from .registry import DatasetSpec as DatasetSpec
from .segmentation import Sample as Sample
from .segmentation import SegmentationSet as SegmentationSet
from .segmentation import class_names as class_names
from .segmentation import open_sets as open_sets
