"""Models and what they read: loading, prompts as padded batches of tokens, pairs of a base and its fine-tuning.

    model, tokenizer = load("tiny-base")                      # a folder, a hub name, base+adapter, a name of the zoo
    batch = encode(tokenizer, ["m 1+1=", "m 2+2=3"])          # ids (batch, pos) and the mask of what is real
    with untouched(model):
        logits = model(**batch.inputs(model)).logits          # right on either side of padding
    pair = Pair.load("tiny-base", "tiny-chain")               # refused where the two don't fit together

| file | holds |
|---|---|
| loading.py | `load`, `located`, `no_bars`, `cache_name`; `untouched`, in which a model is looked at |
| batch.py | `encode`, `as_batch`, `Batch`; prompts as lists of token ids |
| pair.py | `Pair` |
"""

from surgery.models.batch import Batch, as_batch, encode, encoded_prompts, pad_id, prompt_ids, tokenized
from surgery.models.loading import cache_name, load, located, no_bars, untouched
from surgery.models.pair import Pair

__all__ = [
    "Batch", "Pair", "as_batch", "cache_name", "encode", "encoded_prompts", "load", "located", "no_bars", "pad_id",
    "prompt_ids", "tokenized", "untouched",
]  # fmt: skip
