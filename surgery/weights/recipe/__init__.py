"""Recipes: a merge as YAML, in our words (`method:`) or in mergekit's (`merge_method:`), checked before it runs.

| file | what it holds |
|---|---|
| text.py | YAML to plain data with line numbers; bombs, tags and double keys refused |
| field.py | a place in a document: checked reading, errors that name the place |
| contract.py, signatures.py | what a method asks for; read from its signature without importing torch |
| mergekit.py, dialects.py | mergekit's methods and defaults in our words; the words of both dialects |
| values.py | constants, gradients over layers, choices by tensor name |
| schema.py | the normal form (Recipe, Module, Slice, Input) and `resolve`, the arguments for one tensor |
| compile.py, references.py, outputs.py, checks.py | from a document to the normal form |
| stages.py | `load_recipes`, `recipe_from_command`: the ways in |

Nothing here imports torch or reads a model, so that a plan is instant.
"""

from surgery.weights.recipe.contract import Contract, Parameter
from surgery.weights.recipe.schema import (
    Input,
    ModelRef,
    Module,
    Recipe,
    Slice,
    TokenizerRule,
    TokenRule,
    relative_depth,
    resolve,
)
from surgery.weights.recipe.signatures import signature_of, signatures
from surgery.weights.recipe.stages import load_recipes, recipe_from_command, recipe_from_source
from surgery.weights.recipe.values import Case, Value

__all__ = [
    "Case", "Contract", "Input", "ModelRef", "Module", "Parameter", "Recipe", "Slice", "TokenRule", "TokenizerRule",
    "Value", "load_recipes", "recipe_from_command", "recipe_from_source", "relative_depth", "resolve", "signature_of",
    "signatures",
]  # fmt: skip
