"""Merging that looks at data: gradients, activations, entropies or scores of plain PyTorch models in memory.

| file          | what it does                                                                   | needs             |
|---------------|--------------------------------------------------------------------------------|-------------------|
| fisher.py     | weights every parameter by how much the model's predictions hang on it         | gradients         |
| regmean.py    | solves each linear layer for the outputs that its parents would have given     | inputs            |
| adamerging.py | learns one coefficient a task, or a task and layer, by making predictions sure | inputs, gradients |
| soup.py       | averages models greedily while a held-out score does not fall                  | a score           |
| tune.py       | searches the numbers of any recipe                                             | a score           |
| space.py      | places in a recipe and the ranges of their values                              |                   |
| states.py     | the tensors of models by name: checked, averaged, put into a model for a while |                   |
| batches.py    | batches through a model: positions that count, padding that does not           |                   |

Batches are what a data loader gives: mappings of tensors with the batch as first dimension (`input_ids`,
`attention_mask`, `labels`, or whatever the model's `forward` takes), or a bare tensor. `labels` of -100 mark positions
that do not count.
Models are left as found, also after an exception: parameters, gradients, hooks and training mode.
"""

from surgery.weights.with_data.adamerging import AdaMerging, adamerging
from surgery.weights.with_data.fisher import fisher_diagonal, fisher_merge
from surgery.weights.with_data.regmean import Grams, input_grams, regmean_merge
from surgery.weights.with_data.soup import Soup, greedy_soup
from surgery.weights.with_data.states import loaded, state_of
from surgery.weights.with_data.tune import Tuning, tune

__all__ = [
    "AdaMerging",
    "Grams",
    "Soup",
    "Tuning",
    "adamerging",
    "fisher_diagonal",
    "fisher_merge",
    "greedy_soup",
    "input_grams",
    "loaded",
    "regmean_merge",
    "state_of",
    "tune",
]
