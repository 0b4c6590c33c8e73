"""Starts the backend on port 9090 (or PORT), for one project: python serve.py"""

import os

from label_studio_ml.api import init_app
from model import GroupViTBackend

if __name__ == "__main__":
    init_app(GroupViTBackend).run(host=os.environ.get("HOST", "127.0.0.1"), port=int(os.environ.get("PORT", "9090")))
