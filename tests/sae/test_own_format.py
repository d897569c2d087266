"""Our own files: bit for bit, rule and all; and what they are refused for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import load, save
from surgery.sae.rules import RULES, BatchTopK, Matryoshka, TopK

EVERY = [kind(**({"k": 3} if "k" in kind.__dataclass_fields__ else {})) for kind in RULES.values()]


@pytest.mark.parametrize("rule", [*EVERY, Matryoshka(k=2.5, widths=(4, 9)), TopK(k=2, by_norm=False, aux=0.5)], ids=str)
@pytest.mark.parametrize("more", [{}, {"models": 2}, {"d_out": 6, "centered": False, "skip": True}], ids=str)
def test_every_dictionary_comes_back_bit_for_bit(rule, more, tmp_path):
    mine = Dictionary(8, 20, rule, **more)
    for value in mine.state_dict().values():
        value += torch.rand(value.shape)
    save(mine, tmp_path / "d", metadata={"site": "resid_post.1"})
    found, about = load(tmp_path / "d")
    assert found.rule == rule and type(found.rule) is type(rule) and about == {"site": "resid_post.1"}
    assert (found.models, found.is_centered, found.d_out) == (mine.models, mine.is_centered, mine.d_out)
    theirs = found.state_dict()
    assert theirs.keys() == mine.state_dict().keys()
    assert all(torch.equal(v, theirs[k]) and v.dtype == theirs[k].dtype for k, v in mine.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version 2 of 'dictionary'; this program reads version 1"),
        ({"kind": "other"}, "version 1 of 'other'"),
        ({"rule": {"topkk": {}}}, "no rule for a dictionary 'topkk'"),
        ({"rule": {"topk": {"k": 99}}}, "can't use 99 of 20"),
        ({"rule": {"topk": {"depth": 1}}}, "no setting 'depth'"),
        ({"rule": {"jumprelu": {}}}, "no tensor 'threshold'"),
        ({"rule": {}}, "One rule is expected"),
        ({"models": 3}, "do not fit"),
        ({"models": "2"}, "models is '2'"),
        ({"models": 0}, "models is 0"),
    ],
    ids=range(10),
)
def test_configs_that_do_not_fit_are_told(change, told, tmp_path):
    save(Dictionary(8, 20, TopK(k=3)), tmp_path / "d")
    config = tmp_path / "d" / "dictionary.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "d")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"encoder": torch.zeros(20, 9)}, "encoder reads 9 numbers and the decoder gives 8"),
        ({"bias": torch.zeros(19)}, r"'bias' is F32 \[19\]"),
        ({"other": torch.zeros(2)}, "unknown here: other"),
        ({"decoder": torch.full((20, 8), torch.nan)}, "not finite"),
        ({"threshold": torch.zeros(7, dtype=torch.float64)}, "threshold"),
    ],
    ids=range(5),
)
def test_tensors_that_do_not_fit_are_told(tensors, told, tmp_path):
    save(Dictionary(8, 20, BatchTopK(k=3)), tmp_path / "d")
    file = tmp_path / "d" / "dictionary.safetensors"
    save_file(load_file(file) | tensors, file)
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "d")
