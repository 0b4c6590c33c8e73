from .coco import to_coco as to_coco
from .coco import to_coco_annotations as to_coco_annotations
from .coco import to_coco_results as to_coco_results
from .fiftyone import to_fiftyone as to_fiftyone
from .fiftyone import to_fiftyone_detections as to_fiftyone_detections
from .label_studio import to_label_studio as to_label_studio
from .outlines import polygons as polygons
from .supervision import to_supervision as to_supervision
