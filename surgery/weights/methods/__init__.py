"""The merge methods as equations: pure functions on whole tensors, the reference for every faster form.

A method is a function `(tuned, base, *, parameters) -> tensor`, decorated with `@method(name, ...)`. Its keyword-only
arguments are the parameters that a recipe may name; `PerInput[T]` takes one value for all inputs or one for each.
Arithmetic is in float32, or float64 if any input is. In the formulas B is the base, F_i a tuned model, d_i = F_i - B.
The unit says what a method may be called on: any slice (element), blocks of rows (row), whole tensors only (tensor);
"row*" and the like depend on a parameter, see `Method.unit_for`.

| method           | paper               | what it does                                                     | unit     |
|------------------|---------------------|------------------------------------------------------------------|----------|
| linear           | 2203.05482          | weighted average of models; equal weights are the uniform soup   | element  |
| task_arithmetic  | 2212.04089          | base + scale * weighted sum of differences; negation, analogy    | element  |
| lines            | 2410.17146          | task arithmetic whose scale grows with depth                     | element  |
| passthrough      |                     | one model as it is: layer stacking                               | element  |
| ties             | 2306.01708          | keep the largest, elect signs, average what agrees               | tensor   |
| dare_linear      | 2311.03099          | drop at random, rescale, add                                     | element* |
| dare_ties        | 2311.03099          | drop at random, rescale, elect signs, average what agrees        | element* |
| breadcrumbs      | 2312.06795          | drop outliers and dust, add                                      | tensor*  |
| breadcrumbs_ties | 2312.06795          | drop outliers and dust, elect signs, average what agrees         | tensor*  |
| della_linear     | 2406.11617          | drop at random by rank in the row, rescale, add                  | row*     |
| della            | 2406.11617          | drop by rank, rescale, elect signs, average what agrees          | row*     |
| sce              | 2408.07990          | keep where tasks vary, weight by energy, erase minority signs    | tensor   |
| ram              | 2601.13572          | mean over the models that moved an element                       | element  |
| ram_plus         | 2601.13572          | RAM that strengthens what one model alone changed                | tensor   |
| magmax           | 2407.06322          | each element from the task that moved it most                    | element  |
| emr              | 2405.17461          | elected sign with the largest agreeing magnitude                 | element  |
| consensus        | 2405.07813          | task arithmetic where at least k TALL masks agree                | element  |
| nearswap         | mergekit            | towards the tuned model by at most t in each element             | element  |
| arcee_fusion     | mergekit            | only the changes of outstanding importance                       | tensor   |
| slerp            | Shoemake 1985       | spherical interpolation of base and tuned                        | tensor   |
| nuslerp          | mergekit            | spherical interpolation of two models or two task vectors        | tensor*  |
| multislerp       | mergekit            | mean direction of many at their mean norm                        | tensor   |
| karcher          | 2603.04972          | Riemannian mean of the directions                                | tensor   |
| model_stock      | 2403.19522          | towards the average, the further the better the tasks agree      | tensor*  |
| iso_c            | 2502.04959          | sum of differences with equal singular values                    | tensor   |
| iso_cts          | 2502.04959          | the same, with directions kept for single tasks                  | tensor   |

Also here: `unify` (EMR's masks and scales), `tall_masks`, and the coefficient functions of `geometric`.
"""

from surgery.weights.methods import geometric, linear, masks, sparse, spectral
from surgery.weights.methods.masks import Unified, tall_masks, unify
from surgery.weights.methods.registry import (
    METHODS,
    REQUIRED,
    Hidden,
    Method,
    Param,
    PerInput,
    Unit,
    method,
    per_input,
)

__all__ = [
    "METHODS",
    "REQUIRED",
    "Hidden",
    "Method",
    "Param",
    "PerInput",
    "Unified",
    "Unit",
    "geometric",
    "linear",
    "masks",
    "method",
    "per_input",
    "sparse",
    "spectral",
    "tall_masks",
    "unify",
]
