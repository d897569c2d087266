"""Path patching: which head tells which, and which tell the logits.

| file             | what is there                                                                     |
|------------------|-----------------------------------------------------------------------------------|
| path_patching.py | `path_patch`                                                                      |
| ends.py          | senders and receivers, and where they are                                         |
| passes.py        | the pass in which attention is frozen and only MLPs answer                        |
| branches.py      | a recorded pass taken up with changes in several layers; what it costs            |
"""

from analysis.paths.path_patching import path_patch

__all__ = ["path_patch"]
