"""Circuits: heads that work together, found backwards from the answer, kept as files, and measured by what they do.

| file          | what is there                                                                        |
|---------------|--------------------------------------------------------------------------------------|
| discovery.py  | `discover`: group by group, by path patching                                         |
| groups.py     | `Circuit`: groups of heads at positions, as a file                                   |
| edges.py      | `EdgeCircuit`: edges with scores, as a file                                          |
| criteria.py   | `evaluate_circuit`, `faithfulness`, `completeness`                                   |
| minimality.py | `minimality`                                                                         |
| ablation.py   | what heads outside a circuit say                                                     |
| passes.py     | many circuits for the price of few                                                   |
"""

from analysis.circuits.criteria import (
    Completeness,
    Faithfulness,
    completeness,
    evaluate_circuit,
    faithfulness,
    random_circuit,
)
from analysis.circuits.discovery import Discovery, Step, discover, entity_tracking
from analysis.circuits.edges import EdgeCircuit
from analysis.circuits.groups import Circuit, Group, Head, Recall
from analysis.circuits.minimality import Minimality, minimality

__all__ = [
    "Circuit", "Completeness", "Discovery", "EdgeCircuit", "Faithfulness", "Group", "Head", "Minimality", "Recall",
    "Step", "completeness", "discover", "entity_tracking", "evaluate_circuit", "faithfulness", "minimality",
    "random_circuit",
]  # fmt: skip
