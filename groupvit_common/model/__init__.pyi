from .config import GroupViTConfig as GroupViTConfig
from .config import GroupViTTextConfig as GroupViTTextConfig
from .config import GroupViTVisionConfig as GroupViTVisionConfig
from .outputs import GroupViTModelOutput as GroupViTModelOutput
from .outputs import ModelOutput as ModelOutput
from .parameters import manifest as manifest
