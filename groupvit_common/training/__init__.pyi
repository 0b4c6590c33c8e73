from .recipe import Recipe as Recipe
from .recipe import get_recipe as get_recipe
from .recipe import recipe_names as recipe_names
