"""Tokens of one model told in those of another: by their strings, and only where both split text alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.logits.vocabulary import align

LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789+= \n"]
BASE = ["<s>", "</s>", "<unk>", *LETTERS]
CHAT = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>"]
INF = float("-inf")


def spelling(tokens, *, end="</s>", merges=(), added=()):
    """A tokenizer in memory that spells: token `i` is `tokens[i]`; `merges` are pairs of letters read as one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    model = models.BPE({t: i for i, t in enumerate(tokens)}, list(merges), unk_token="<unk>")
    inner = Tokenizer(model)
    inner.decoder = decoders.Fuse()
    special = [t for t in tokens if t[0] == "<" and len(t) > 1]
    inner.add_special_tokens([AddedToken(t, special=True) for t in [*special, *added]])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, unk_token="<unk>")


@pytest.fixture(scope="module")
def base():
    return spelling(BASE)


def logits(width, *rows, seed=0):
    return torch.randn(*rows, width, generator=torch.Generator().manual_seed(seed))


def test_the_same_tokenizer_is_free(base):
    found = align(base, len(BASE), base, len(BASE))
    values = logits(len(BASE), 2, 3)
    assert found.outputs(values).data_ptr() == values.data_ptr()
    assert torch.equal(found.outputs(values), values)
    assert (found.columns, found.known, found.inputs, found.end, found.notes) == (None, None, None, None, ())
    ids = torch.tensor([[1, 2]])
    assert found.feed(ids) is ids
    assert found.size == len(BASE) and found.share == 1 and found.ends == (1,)


@pytest.mark.parametrize("ours,theirs", [(0, 47), (47, 0), (64, 47)])
def test_rows_that_pad_an_embedding_change_nothing(base, ours, theirs):
    size = len(BASE)
    again = spelling(BASE)
    found = align(base, size + ours, again, size + theirs, name="tuned")
    values = logits(size + theirs, 4)
    values[:, size:] = 99.0  # what a sampler would take
    assert found.size == size and found.known is None
    assert torch.equal(found.outputs(values), values[:, :size])
    assert found.outputs(values).data_ptr() == values.data_ptr()
    if theirs:
        assert found.notes == (f"tuned has {size + theirs} rows for {size} tokens: the {theirs} behind them are "
                               "left out.",)  # fmt: skip


def test_logits_of_another_width_are_refused(base):
    found = align(base, len(BASE), base, len(BASE), name="tuned")
    with pytest.raises(SurgeryError, match="tuned gives logits of 50 columns; 43 were expected"):
        found.outputs(logits(50, 1))


def test_an_embedding_that_is_shorter_than_the_tokenizer_bounds_the_vocabulary(base):
    assert align(base, 40, base, 43).size == 40
    found = align(base, 43, base, 40, name="small")
    assert found.columns is not None and found.known is not None
    assert found.known.tolist() == [True] * 40 + [False] * 3
    out = found.outputs(logits(40, 2), fill=-7.0)
    assert torch.equal(out[:, :40], logits(40, 2)) and (out[:, 40:] == -7).all()
    assert found.feed(torch.tensor([39, 42])).tolist() == [39, 2]  # '<unk>' stands in
    assert any("small lacks 3 tokens of the reference: '=', ' ', '\\n'" in note for note in found.notes)
    assert any("small reads 3 tokens that it lacks as '<unk>'" in note for note in found.notes)


def test_added_chat_tokens_are_left_out_and_the_end_of_a_turn_counts_as_the_end(base):
    tuned = spelling([*BASE, *CHAT], end="<|im_end|>")
    found = align(base, len(BASE), tuned, len(BASE) + 5, name="tuned", reference_name="large")
    values = logits(len(BASE) + 5, 3)
    out = found.outputs(values)
    assert out.shape == (3, len(BASE)) and found.known is None
    assert torch.equal(out[:, 2:], values[:, 2 : len(BASE)]) and torch.equal(out[:, 0], values[:, 0])
    both = values[:, [1, len(BASE) + 1]].logsumexp(-1)  # P(</s>) + P(<|im_end|>): it ends
    assert torch.allclose(out[:, 1], both, atol=1e-6)
    assert found.feed(torch.tensor([0, 1, 5])).tolist() == [0, len(BASE) + 1, 5]
    assert found.ends == (1,)
    assert "'<|im_end|>', with which tuned ends, counts as '</s>' of large." in found.notes
    assert any(note.startswith("tuned has 5 tokens that large lacks: '<|im_start|>'") for note in found.notes)


def test_ends_that_only_a_generation_config_names_count_too(base):
    tuned = spelling([*BASE, *CHAT])
    values = logits(len(BASE) + 5, 3)
    assert torch.equal(align(base, len(BASE), tuned, len(BASE) + 5).outputs(values), values[:, : len(BASE)])
    found = align(base, len(BASE), tuned, len(BASE) + 5, ends=[1, len(BASE) + 1, 8])
    assert found.ends == (1, 8)
    assert torch.allclose(found.outputs(values)[:, 1], values[:, [1, len(BASE) + 1]].logsumexp(-1), atol=1e-6)


def test_an_end_that_both_know_stays_itself():
    tokens = [*BASE, *CHAT]
    found = align(spelling(tokens), len(tokens), spelling(tokens, end="<|im_end|>"), len(tokens))
    values = logits(len(tokens), 2)
    assert found.outputs(values).data_ptr() == values.data_ptr()
    assert found.ends == (len(BASE) + 1,)


def test_a_base_ends_where_its_tuned_reference_ends_otherwise(base):
    tuned = spelling([*BASE, *CHAT], end="<|im_end|>")
    found = align(tuned, len(BASE) + 5, base, len(BASE), least=0.8)
    values = logits(len(BASE), 2)
    out = found.outputs(values)
    assert torch.equal(out[:, len(BASE) + 1], values[:, 1])
    assert (out[:, 1] == INF).all()  # said once only
    assert found.known is not None and found.known.sum() == len(BASE)
    assert found.ends == (len(BASE) + 1,)
    assert found.feed(torch.tensor([len(BASE) + 1, 1])).tolist() == [1, 1]


def test_the_user_s_map_comes_first(base):
    tuned = spelling([*BASE, *CHAT], end="<|im_end|>")
    width = len(BASE) + 5
    values = logits(width, 2)
    found = align(base, len(BASE), tuned, width, token_map={"</s>": "<tool>", 0: len(BASE), "z": None})
    out = found.outputs(values)
    assert torch.equal(out[:, 1], values[:, -1]) and torch.equal(out[:, 0], values[:, len(BASE)])
    z = BASE.index("z")
    assert (out[:, z] == INF).all() and found.known is not None and int((~found.known).sum()) == 1
    assert found.feed(torch.tensor([1, 0, z])).tolist() == [width - 1, len(BASE), z]
    assert found.ends == ()  # '<|im_end|>' counts for nothing now: the map says what ends
    named = align(base, len(BASE), tuned, width, token_map={"</s>": "<|im_end|>"})
    assert named.ends == (1,) and torch.equal(named.outputs(values)[:, 1], values[:, len(BASE) + 1])
    # An end that the map puts elsewhere is left there.
    elsewhere = align(base, len(BASE), tuned, width, token_map={"a": "<|im_end|>", "b": "</s>"})
    assert elsewhere.ends == (3,) and (elsewhere.outputs(values)[:, 1] == INF).all()
    # A token that was given away speaks for nothing else.
    moved = align(base, len(BASE), tuned, width, token_map={"a": "b"}).outputs(values)
    assert torch.equal(moved[:, 3], values[:, 4]) and (moved[:, 4] == INF).all()


@pytest.mark.parametrize("wrong,told", [
    ({"<eos>": "</s>"}, "the reference has no token '<eos>'"),
    ({"</s>": "<eos>"}, "the member has no token '<eos>'"),
    ({99: 1}, "the reference has no token 99"),
    ({"a": "b", "c": "b"}, "token_map names 'c' or 'b' twice"),
])  # fmt: skip
def test_a_map_of_tokens_that_are_not_there_is_refused(base, wrong, told):
    with pytest.raises(SurgeryError, match=told):
        align(base, len(BASE), spelling(BASE), len(BASE), token_map=wrong)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(len(LETTERS))), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_outputs_and_feed_are_inverse_under_a_permutation(order, padding, seed):
    tokens = [*BASE[:3], *(LETTERS[i] for i in order)]
    base = spelling(BASE)
    found = align(base, len(BASE), spelling(tokens), len(tokens) + padding)
    values = logits(len(tokens) + padding, 2, seed=seed)
    ids = torch.arange(found.size)
    assert torch.equal(found.outputs(values), values[:, found.feed(ids)])
    one_hot = torch.nn.functional.one_hot(found.feed(ids), len(tokens) + padding).float()
    assert torch.equal(found.outputs(one_hot), torch.eye(found.size))
    assert [tokens[i] for i in found.feed(ids).tolist()] == BASE
    assert found.ends == (1,)


@settings(max_examples=40, deadline=None)
@given(gone=st.sets(st.sampled_from(LETTERS[10:]), max_size=3), order=st.randoms(use_true_random=False))
def test_under_a_partial_map_every_column_speaks_once(gone, order):
    tokens = [t for t in LETTERS if t not in gone] + [f"<no {t}>" for t in gone]
    order.shuffle(tokens)
    tokens = ["<unk>", *tokens, "</s>", "<s>"]
    found = align(spelling(BASE), len(BASE), spelling(tokens), len(tokens), probes=["abc"])
    values = logits(len(tokens), 1)
    out = found.outputs(values)[0]
    known = torch.tensor([t in tokens for t in BASE])
    assert torch.equal(known, torch.ones_like(known) if found.known is None else found.known)
    assert (out[~known] == INF).all()
    assert torch.equal(out[known], values[0, [tokens.index(t) for t in BASE if t in tokens]])


def test_other_vocabularies_are_refused_with_what_differs(base):
    other = spelling(["<unk>", "<eos>", *"ABCDEFG", *"xyz"], end="<eos>")
    with pytest.raises(SurgeryError) as caught:
        align(base, len(BASE), other, 12, name="foreign", reference_name="large")
    told = str(caught.value)
    assert "foreign (12 rows) knows 4 of 43 tokens of large, 9.3 %; at least 90 % are needed" in told
    assert "4 tokens with another id: '<unk>' 2 -> 0, 'x' 26 -> 9" in told
    assert "39 tokens only in large: '<s>', '</s>', 'a', 'b', 'c' and 34 more" in told
    assert "8 tokens only in foreign" in told and "eos_token: '</s>' and '<eos>'" in told
    assert caught.value.hint is not None and "token_map" in caught.value.hint
    assert align(base, len(BASE), other, 12, least=0, probes=()).share == pytest.approx(5 / 43)  # the end, too


def test_tokenizers_that_split_otherwise_are_refused():
    tokens = [*BASE, "ab"]
    merging, plain = spelling(tokens, merges=[("a", "b")]), spelling(tokens)
    assert merging.get_vocab() == plain.get_vocab()
    with pytest.raises(SurgeryError, match=r"split 'cab' differently: from token 1 on \['a', 'b'\] and \['ab'\]"):
        align(plain, len(tokens), merging, len(tokens), probes=["abel", "cab"][1:])
    assert align(plain, len(tokens), merging, len(tokens), probes=()).columns is None


def test_without_a_tokenizer_the_sizes_decide(base):
    assert align(None, 50, None, 50).size == 50
    assert align(base, 50, None, 50).size == len(BASE)
    assert align(None, 50, base, 50).size == 50
    for pair in ((None, base), (base, None), (None, None)):
        with pytest.raises(SurgeryError, match="large has 50 rows and small 43, and there is no tokenizer"):
            align(pair[0], 50, pair[1], 43, name="small", reference_name="large")
    swapped = align(None, 4, None, 4, token_map={0: 1, 1: 0})
    assert swapped.outputs(torch.arange(4.0)).tolist() == [1, 0, 2, 3]
    with pytest.raises(SurgeryError, match="no token 'a', for it has no tokenizer"):
        align(None, 4, None, 4, token_map={"a": 1})


def test_ids_that_stand_for_nothing_can_not_be_drawn():
    holed = spelling(["<s>", "</s>", "<unk>", *LETTERS])
    words = dict(holed.get_vocab())
    del words["c"]
    holed.get_vocab = lambda: words
    found = align(holed, len(BASE), holed, len(BASE))
    assert found.columns is None and found.known is not None
    assert (~found.known).nonzero().flatten().tolist() == [BASE.index("c")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_keep_their_dtype(base, dtype):
    tuned = spelling([*BASE[:3], *LETTERS[::-1], *CHAT], end="<|im_end|>")
    found = align(base, len(BASE), tuned, len(BASE) + 5)
    values = logits(len(BASE) + 5, 3).to(dtype)
    out = found.outputs(values)
    assert out.dtype == dtype and torch.equal(out[:, 3:], values[:, 3 : len(BASE)].flip(-1))
    exact = values[:, [1, len(BASE) + 1]].double().logsumexp(-1)
    assert torch.allclose(out[:, 1].double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert found.to("cpu").outputs(values).equal(out)


@pytest.mark.real
def test_a_real_tokenizer_fits_itself():
    from transformers import AutoTokenizer

    from surgery import zoo

    folder = zoo.resolved("smollm2")
    first, second = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    second.add_tokens(["<mine>"])
    second.eos_token = "<|endoftext|>"
    found = align(first, 49152, second, 49216)
    assert found.size == 49152 and found.columns is None and found.known is None and found.inputs is None
    assert found.ends == (0,)
