from .directory import find_weights as find_weights
from .hub import HubLocation as HubLocation
from .hub import push as push
from .hub import resolve as resolve
