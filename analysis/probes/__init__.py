"""Linear probes: what can be read off activations, in one model and across a pair.

| file      | what is there                                                                 |
|-----------|-------------------------------------------------------------------------------|
| calls.py  | `probe`, `probe_model`, `probe_transfer`                                      |
| fits.py   | the kinds of probe: logistic, LDA, difference of means, ridge                 |
| result.py | `Probe`: directions, scores, prediction, transfer, figures, files             |
| scores.py | balanced accuracy, AUC and R2 with a value an example                         |
| data.py   | checks of what comes in, folds by group, labels of control tasks              |
"""

from analysis.probes.calls import features_of, probe, probe_model, probe_transfer
from analysis.probes.result import Probe

__all__ = ["Probe", "features_of", "probe", "probe_model", "probe_transfer"]
