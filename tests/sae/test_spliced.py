"""What a model loses with a dictionary in it, against the same by hand."""

import pytest
import torch

from surgery.activations import edit
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream, real_tokens
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.sae.spliced import loss_recovered, losses_recovered

TEXTS = ["m 6+9-9=6;", "r bad=dab", "m 5+5=1"]


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base"), load("tiny-chain")
    return base, tuned, [encode(tokenizer, TEXTS[:2]), encode(tokenizer, TEXTS[2:], side="left")]


def by_hand(model, batches, site, change):
    """Mean CE and log-probs of the tokens behind the first of each row, with `change` at all tokens but the first."""
    found, right = [], []
    for batch in batches:
        keep = batch.mask & (batch.positions >= 1)

        def visit(x, keep=keep):
            return torch.where(keep[..., None], change(x), x)

        with torch.no_grad(), edit(model, {site: visit} if change else {}):
            logs = model(**batch.inputs(model)).logits.log_softmax(-1)
        for row in range(len(batch)):
            for at in range(int(batch.first[row]) + 1, int(batch.last[row])):
                found.append(logs[row, at])
                right.append(int(batch.ids[row, at + 1]))
    logs = torch.stack(found).double()
    return -float(logs[torch.arange(len(right)), right].mean()), logs


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ce_and_kl_are_those_by_hand(pair, ablation):
    base, _, batches = pair
    dictionary, site = Dictionary(96, 200, TopK(k=8)), "resid_post.1"
    (found,) = loss_recovered(Stream(base, site, batches), dictionary, ablation=ablation)
    rows = torch.cat([r[site] for r in Stream(base, site, batches)])
    nothing = torch.zeros(96) if ablation == "zero" else rows.mean(0)
    ce, clean = by_hand(base, batches, site, None)
    ce_dictionary, spliced = by_hand(base, batches, site, dictionary)
    ce_ablated, ablated = by_hand(base, batches, site, lambda x: nothing.expand_as(x))
    assert found.tokens == len(clean)
    assert (found.ce, found.ce_dictionary, found.ce_ablated) == pytest.approx((ce, ce_dictionary, ce_ablated), rel=1e-5)
    kl = [float((clean.exp() * (clean - other)).sum(-1).mean()) for other in (spliced, ablated)]
    assert (found.kl_dictionary, found.kl_ablated) == pytest.approx(kl, rel=1e-4)
    assert found.ce_recovered == pytest.approx((ce_ablated - ce_dictionary) / (ce_ablated - ce), rel=1e-4)
    assert found.kl_recovered == pytest.approx(1 - kl[0] / kl[1], rel=1e-4)


def test_several_dictionaries_are_read_together_and_come_to_the_same(pair):
    base, tuned, batches = pair
    passes = []
    handle = base.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    for difference in (False, True):
        stream = Stream([base, tuned], "resid_post.1", batches, difference=difference, longest=5.0)
        width = 96 if difference else 192
        several = {str(seed): Dictionary(width, 200, TopK(k=8), seed=seed) for seed in range(3)} | {"zero": Exact()}
        passes.clear()
        found = losses_recovered(stream, several)
        if not difference:  # the mean, what the dictionaries read, clean, two ablations and four dictionaries
            assert len(passes) == 9 * len(batches)
        for name, dictionary in several.items():
            for ablation in ("zero", "mean"):
                assert found[name][ablation] == loss_recovered(stream, dictionary, ablation=ablation)
    handle.remove()


class Exact(torch.nn.Module):
    """Gives what it is given, or a part of it: a perfect dictionary."""

    def __init__(self, matrix=None):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        return x if self.matrix is None else x @ self.matrix


def test_a_perfect_dictionary_loses_nothing_in_any_of_the_models(pair):
    base, tuned, batches = pair
    for stream, many in ((Stream([base, tuned], "mlp_out.2", batches), 2),
                         (Stream([base, tuned], "mlp_out.2", batches, difference=True), 1),
                         (Stream(base, "z.1", batches), 1)):  # fmt: skip
        found = loss_recovered(stream, Exact())
        assert len(found) == many
        for loss in found:
            assert loss.ce_recovered == pytest.approx(1, abs=1e-5) and loss.kl_dictionary < 1e-6 < loss.kl_ablated
    assert not any(m._forward_hooks for model in (base, tuned) for m in model.modules())


def test_a_transcoder_stands_in_for_what_it_rebuilds(pair):
    base, _, batches = pair
    stream = Stream(base, ["mlp_in.1", "mlp_out.1"], batches)
    rows = list(stream)
    x, y = (torch.cat([r[site] for r in rows]) for site in stream.names)
    linear = torch.linalg.lstsq(x.double(), y.double()).solution.float()  # more numbers than rows: exact here
    (found,) = loss_recovered(stream, Exact(linear), "mlp_in.1", "mlp_out.1")
    assert found.kl_dictionary < 1e-4 < found.kl_ablated


def test_what_has_no_prediction_is_told(pair):
    base, _, batches = pair
    with pytest.raises(SurgeryError, match="no prediction to score"):
        loss_recovered(Stream(base, "resid_post.1", batches, real_tokens(99)), Exact())
    alone = losses_recovered(Stream(base, "resid_post.1", batches), {"one": Exact()}, ablations="zero")
    assert list(alone["one"]) == ["zero"]
    with pytest.raises(SurgeryError, match="no ablation 'nought'"):
        loss_recovered(Stream(base, "resid_post.1", batches), Exact(), ablation="nought")


def test_sinks_of_a_difference_are_those_of_the_difference(pair):
    """Long where the two differ much, though each is as long there as elsewhere: left as they are, and not scored."""
    base, tuned, batches = pair
    longest, site = 3.0, "resid_post.2"
    stream = Stream([base, tuned], site, batches, difference=True, longest=longest)
    counted = sum(
        int((stream.seen(b)[0] & torch.cat([b.mask[:, 1:], torch.zeros(len(b), 1) > 0], 1)).sum()) for b in batches
    )
    lengths = [r[site].norm(dim=1) for r in Stream([base, tuned], site, batches, difference=True)]
    assert any(bool((each > longest * each.median()).any()) for each in lengths), "there are some"
    for ablation in ("zero", "mean"):
        (found,) = loss_recovered(stream, Exact(), ablation=ablation)
        assert found.tokens == counted and found.kl_dictionary < 1e-6
