"""Decoding: from prompts, token after token, for one model or whatever gives logits as a model does.

| file | holds |
|---|---|
| causal.py | `Decoder`, what decoding needs of a policy; `CausalDecoder`, that for a `transformers` model |
| adapter.py | `speaking`: which PEFT adapter a forward pass goes through |
| cache.py, head.py | its key-value cache with room to grow; the seam between hidden states and logits |
| sampling.py | `Sampling`, `draw`: temperature, truncation, noise by place |
| loop.py | `decode`: the loop; rows leave when they end |
| beam.py | `beam_search`: the best or drawn beams of each prompt, as transformers keeps them |
| rollouts.py | `Rollout`, `LocalGenerator`: prompts in, completions with their log-probabilities out |
"""

from surgery.decoding.beam import Beams, Hypothesis, beam_search
from surgery.decoding.causal import CausalDecoder, CausalState, Decoder, State
from surgery.decoding.head import backbone_and_head, undisturbed
from surgery.decoding.loop import decode
from surgery.decoding.rollouts import Generator, LocalGenerator, Rollout, end_tokens
from surgery.decoding.sampling import Sampling, draw, truncate, uniforms

__all__ = [
    "Beams", "CausalDecoder", "CausalState", "Decoder", "Generator", "Hypothesis", "LocalGenerator", "Rollout",
    "Sampling", "State", "backbone_and_head", "beam_search", "decode", "draw", "end_tokens", "truncate", "undisturbed",
    "uniforms",
]  # fmt: skip
