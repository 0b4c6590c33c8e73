from .image_processor import GroupViTImageProcessor as GroupViTImageProcessor
from .images import load_image as load_image
from .processor import GroupViTProcessor as GroupViTProcessor
from .prompts import Label as Label
from .prompts import get_templates as get_templates
from .prompts import parse_labels as parse_labels
from .prompts import read_labels as read_labels
from .tokenizer import CLIPTokenizer as CLIPTokenizer
