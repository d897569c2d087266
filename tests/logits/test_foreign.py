"""A member with another tokenizer: every step against splitting and reading everything anew."""

import pytest
import torch

from surgery.decoding import LocalGenerator, Sampling, undisturbed
from surgery.errors import SurgeryError
from surgery.logits.foreign import ForeignDecoder, spell, token_bytes

LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789+=. \n"]
PAIRS = ["ab", "ba", "th", "the", "he", " a", "e ", "a ", "aa", "bb", " t", " th", " the"]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = ["the cat. the bat", "a+b=c. the theatre", "hay and bay", "größe 日本 🙂 the", "The Abbey"]
PROMPTS = [[5, 6, 7, 8], [9, 4], [11, 12, 13, 3, 3, 7]]


def finished(inner, end="</s>"):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    inner.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(["<unk>", "<s>", end])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, unk_token="<unk>")


def spelling(tokens, merged=(), **more):
    """Letters, and what they are merged to: each of `merged` splits into its first letters and its last."""
    from tokenizers import Tokenizer, decoders, models

    merges = [(t[:-1], t[-1]) for t in sorted(merged, key=len)]
    words = {t: i for i, t in enumerate([*tokens, *merged])}
    inner = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    return finished(inner, **more)


def byte_level():
    """As GPT-2 does it: "Ġthe"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(TEXT * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return finished(inner)


def pieces():
    """As Llama 2 and Gemma do it: "▁the", bytes for what is not in the vocabulary, a space put before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = ["▁" if t == " " else t for t in LETTERS]
    merged = ["th", "the", "▁the", "▁a", "at", "▁b"]
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *letters, *merged]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("a", "t"), ("▁", "b")]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    return finished(inner)


def model_for(tokenizer, family="llama", dtype=torch.float32, context=256, padding=3):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    more = {"sliding_window": 5} if family == "mistral" else {}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer) + padding, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plain(reference):
    """By id what a token of the letters' tokenizers writes."""
    words = {i: t for t, i in reference.get_vocab().items()}
    return ["" if words[i] in SPECIAL else words[i] for i in range(len(words))]


CHARS, BIGRAMS = spelling([*SPECIAL, *LETTERS]), spelling([*SPECIAL, *LETTERS[::-1]], PAIRS)


def anew(model, tokenizer, reference, prompt, tokens):
    """The reference's logits when the text is put together, split and read from the start: letters' tokenizers only."""
    written, own = plain(reference), tokenizer.get_vocab()
    response = tokenizer("".join(written[t] for t in tokens), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, -1]
    found = torch.full((len(written),), -torch.inf)
    for i, text in enumerate(written):
        if text in own:
            found[i] = logits[own[text]]
    found[2] = logits[own["</s>"]]
    return found


def some_tokens(reference, rows, count, seed=0):
    """Random text, thick with what merges."""
    ids = [i for i, t in enumerate(plain(reference)) if t and set(t) <= set("abthe ")]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ids)[torch.randint(len(ids), (rows, count), generator=generator)]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("reference,own", [(CHARS, BIGRAMS), (BIGRAMS, CHARS)], ids=["longer", "shorter"])
def test_every_step_is_as_if_everything_were_read_anew(reference, own, family):
    model = model_for(own, family)
    decoder = ForeignDecoder(model, own, reference, len(reference) + 5)
    tokens = some_tokens(reference, 3, 14)
    cropped = 0
    with undisturbed(model):
        logits, state = decoder.prefill_rows(PROMPTS)
        for t in range(tokens.shape[1] + 1):
            expected = [anew(model, own, reference, p, tokens[i, :t]) for i, p in enumerate(PROMPTS)]
            assert torch.allclose(logits, torch.stack(expected), atol=1e-4)
            if t < tokens.shape[1]:
                before = [[*row.read] for row in state.rows]
                logits, state = decoder.step(tokens[:, t], state)
                cropped += sum(r.read[: len(b)] != b for r, b in zip(state.rows, before, strict=True))
    lengths = [len(p) + len(row.read) for p, row in zip(PROMPTS, state.rows, strict=True)]
    assert state.positions.tolist() == lengths == [row.cache.length for row in state.rows]
    assert (cropped > 5) == (own is BIGRAMS)  # letters merge with what comes after them


def test_known_tokens_are_those_that_spell_the_same():
    decoder = ForeignDecoder(model_for(BIGRAMS), BIGRAMS, CHARS, len(CHARS))
    assert decoder.map.size == len(CHARS) and decoder.map.ends == (2,)
    assert decoder.map.known is not None
    assert (~decoder.map.known).nonzero().flatten().tolist() == [0, 1]  # '<unk>' and '<s>'
    other = ForeignDecoder(model_for(CHARS), CHARS, BIGRAMS, len(BIGRAMS)).map
    assert other.known is not None and int((~other.known).sum()) == 2 + len(PAIRS)
    logits = torch.randn(2, other.size)
    assert torch.equal(other.outputs(logits)[:, other.known], logits[:, other.known])


def test_a_space_is_a_space_in_bytes_and_in_pieces():
    reference, own = byte_level(), pieces()
    ours, theirs = token_bytes(reference), token_bytes(own)
    assert ours[reference.get_vocab()["Ġthe"]] == b" the" == theirs[own.get_vocab()["▁the"]]
    assert ours[2] is None is theirs[2]
    assert theirs[own.get_vocab()["<0x0A>"]] == b"\n"
    for tokenizer, spelled in ((reference, ours), (own, theirs)):
        for text in TEXT:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert spell(ids, spelled)[0].removeprefix(" ") == text
    model = model_for(own)
    decoder = ForeignDecoder(model, own, reference, len(reference))
    logits, _ = decoder.prefill_rows([[1, 270]])
    with torch.no_grad():
        raw = model(torch.tensor([[1, 270]])).logits[0, -1]
    words = reference.get_vocab()
    for ours_, theirs_ in (("Ġthe", "▁the"), ("the", "the"), ("a", "a"), ("Ġ", "▁"), ("Ã", "<0xC3>"), ("A", "<0x41>")):
        assert logits[0, words[ours_]].item() == pytest.approx(raw[own.get_vocab()[theirs_]].item(), abs=1e-5)


def test_a_response_goes_on_from_its_prompt_without_a_space_between_and_in_whole_characters():
    reference, own = byte_level(), pieces()
    model = model_for(own)
    decoder = ForeignDecoder(model, own, reference, len(reference))
    ids = reference("athe größe 日🙂 the", add_special_tokens=False)["input_ids"]
    ids = [*ids[:3], 1, *ids[3:]]  # a special token writes nothing
    spelled, words, silent = token_bytes(own), own.get_vocab(), 0
    with undisturbed(model):
        logits, state = decoder.prefill_rows([[1, 270]])
        for t, token in enumerate(ids):
            logits, state = decoder.step(torch.tensor([token]), state)
            text, whole = spell(ids[: t + 1], token_bytes(reference))
            (row,) = state.rows
            assert b"".join(spelled[i] or b"" for i in row.read) == text.encode()
            raw = model(torch.tensor([[1, 270, *row.read]]), use_cache=False).logits[0, -1]
            told = logits[0, reference.get_vocab()["Ġthe"]].item()
            assert told == pytest.approx(raw[words["▁the"]].item() if whole else 0, abs=1e-4)
            if not whole:  # no opinion: all that it knows is as likely
                silent += 1
                assert set(logits[0].tolist()) == {0.0, -torch.inf}
    assert silent >= 2
    assert row.read[0] == words["a"] and row.read[-1] == words["▁the"]


def test_rows_are_repeated_and_selected_as_copies():
    model = model_for(BIGRAMS)
    decoder = ForeignDecoder(model, BIGRAMS, CHARS, len(CHARS))
    tokens = some_tokens(CHARS, 4, 9, seed=1)
    with undisturbed(model):
        _, state = decoder.prefill_rows(PROMPTS[:2])
        twice = state.repeat(2)  # rows 0, 0, 1, 1
        for t in range(4):
            logits, twice = decoder.step(tokens[:, t], twice)
        some = twice.select(torch.tensor([3, 1, 1]))
        more = tokens[[3, 1, 2], 4:]
        logits = decoder.read(more, some)
        assert decoder.read(more, twice.select(torch.tensor([3, 1, 1])), keep=2).equal(logits[:, -2:])
    for row, (prompt, start) in enumerate([(1, 3), (0, 1), (0, 1)]):
        read = torch.cat([tokens[start, :4], more[row]])
        assert torch.allclose(logits[row, -1], anew(model, BIGRAMS, CHARS, PROMPTS[prompt], read), atol=1e-4)
    assert [row.tokens for row in state.rows] == [[], []]
    assert [len(row.tokens) for row in twice.rows] == [4] * 4


@pytest.mark.parametrize("count", [1, 3, 6])
def test_forgotten_tokens_leave_no_trace(count):
    model = model_for(BIGRAMS)
    decoder = ForeignDecoder(model, BIGRAMS, CHARS, len(CHARS))
    tokens, other = some_tokens(CHARS, 3, 6, seed=2), some_tokens(CHARS, 3, 4, seed=3)
    with undisturbed(model):
        _, state = decoder.prefill_rows(PROMPTS)
        decoder.read(tokens, state)
        state.crop(count)
        special = decoder.read(torch.ones(3, 1, dtype=torch.long), state)[:, 0]  # writes nothing: what was left
        told = decoder.read(other, state)
    for row, prompt in enumerate(PROMPTS):
        left = tokens[row, : 6 - count]
        assert torch.allclose(special[row], anew(model, BIGRAMS, CHARS, prompt, left), atol=1e-4)
        for t in range(4):
            read = torch.cat([left, other[row, : t + 1]])
            assert torch.allclose(told[row, t], anew(model, BIGRAMS, CHARS, prompt, read), atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_with_the_reference_s_own_tokenizer_it_is_the_model_itself(temperature):
    model = model_for(CHARS, padding=0)
    sampling = Sampling(max_new_tokens=12, temperature=temperature)
    decoder = ForeignDecoder(model, CHARS, CHARS, len(CHARS))

    class Known:
        """The model with what a foreign member doesn't know forbidden."""

        models = (model,)

        def __init__(self):
            from surgery.decoding import CausalDecoder

            self.inner = CausalDecoder(model)

        def prefill(self, ids, mask):
            logits, state = self.inner.prefill(ids, mask)
            return decoder.map.outputs(logits), state

        def step(self, tokens, state):
            logits, state = self.inner.step(tokens, state)
            return decoder.map.outputs(logits), state

    expected = LocalGenerator(Known(), CHARS, sampling)(PROMPTS, 2, [0, 1, 2])
    found = LocalGenerator(decoder, CHARS, sampling)(PROMPTS, 2, [0, 1, 2])
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert any(len(r.completion_ids) == 12 for r in found)


def test_the_foreign_end_counts_as_the_reference_s():
    own = spelling(["<unk>", "<s>", "<eos>", *LETTERS], end="<eos>")
    model = model_for(own)
    decoder = ForeignDecoder(model, own, CHARS, len(CHARS), name="odd", reference_name="large")
    logits, _ = decoder.prefill_rows([[5, 6]])
    with torch.no_grad():
        raw = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert logits[0, 2].item() == pytest.approx(raw[2].item(), abs=1e-5)
    assert decoder.map.ends == (2,)
    assert "'<eos>', with which odd ends, counts as '</s>' of large." in decoder.map.notes


def test_bfloat16():
    model = model_for(BIGRAMS, dtype=torch.bfloat16)
    decoder = ForeignDecoder(model, BIGRAMS, CHARS, len(CHARS))
    tokens = some_tokens(CHARS, 3, 6)
    with undisturbed(model):
        logits = decoder.read(tokens, decoder.prefill_rows(PROMPTS)[1])[:, -1]
    assert logits.dtype == torch.bfloat16
    expected = torch.stack([anew(model, BIGRAMS, CHARS, p, tokens[i]) for i, p in enumerate(PROMPTS)])
    known = expected > -torch.inf
    assert (logits.float()[known] - expected[known]).abs().max() < 0.05 * expected[known].abs().max()


def test_a_response_that_outgrows_the_foreign_context_is_refused():
    model = model_for(CHARS, context=8)
    decoder = ForeignDecoder(model, CHARS, BIGRAMS, len(BIGRAMS), name="short")
    _, state = decoder.prefill_rows([[5, 6, 7, 8]])
    the = torch.tensor([BIGRAMS.get_vocab()[" the"]])
    _, state = decoder.step(the, state)
    with pytest.raises(SurgeryError, match="short needs 12 of its own tokens .* its context is 8"):
        decoder.step(the, state)


def test_tokenizers_that_change_the_text_are_refused():
    from tokenizers import normalizers

    lower = spelling([*SPECIAL, *LETTERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ',()*_#:-/"])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(SurgeryError, match="The tokens of odd don't spell the text they are made of: .The quick"):
        ForeignDecoder(model_for(lower), lower, CHARS, len(CHARS), name="odd")
    greek = spelling(["<unk>", "<s>", "</s>", *"αβγδ"])
    with pytest.raises(SurgeryError, match="No token of odd spells the same as one of large"):
        ForeignDecoder(model_for(greek), greek, CHARS, len(CHARS), name="odd", reference_name="large")
