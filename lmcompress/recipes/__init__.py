"""Recipes: YAML to validated objects, the plan of a run, and the run."""

from lmcompress.recipes.loading import builtin_recipes, dump_recipe, load_recipe, parse_recipe, recipe_schema
from lmcompress.recipes.planning import Plan, StagePlan, plan
from lmcompress.recipes.runner import RunResult, run
from lmcompress.recipes.schema import Recipe, Stage, register_part

__all__ = [
    "Plan",
    "Recipe",
    "RunResult",
    "Stage",
    "StagePlan",
    "builtin_recipes",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "plan",
    "recipe_schema",
    "register_part",
    "run",
]
