from .app import create_app as create_app
from .client import Client as Client
from .client import ServedError as ServedError
from .client import ServedSegmentation as ServedSegmentation
from .server import Server as Server
from .settings import ServeSettings as ServeSettings
