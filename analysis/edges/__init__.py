"""Edges of the residual stream: who writes, who reads it, and what patching every edge would do.

| file                    | what is there                                                                    |
|-------------------------|----------------------------------------------------------------------------------|
| attribution_patching.py | `eap`: EAP, EAP-IG, to first order and all edges at once                         |
| graph.py                | `Graph`: writers, readers and edges of a model                                   |
| scores.py               | `EdgeScores`: the matrix of scores, its best edges, circuits cut from it         |
| passes.py               | `evaluate_edges`: all edges outside a circuit patched, exactly                   |
| wiring.py               | what writers write and readers read in a running model                           |
| gradients.py, norms.py  | gradients at sites; norms that stand between a head and the stream               |
| costs.py                | what it costs in forwards                                                        |
"""

from analysis.edges.attribution_patching import METHODS, eap
from analysis.edges.graph import Edge, Graph
from analysis.edges.passes import evaluate_edges
from analysis.edges.scores import EdgeScores

__all__ = ["METHODS", "Edge", "EdgeScores", "Graph", "eap", "evaluate_edges"]
