from .postprocess import Segmentation as Segmentation
