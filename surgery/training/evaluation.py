"""How good the policy is while it trains: greedy accuracy, and the likelihood of the demonstrations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.decoding import LocalGenerator, Sampling
from surgery.models import encoded_prompts
from surgery.training.data import Rows
from surgery.training.rewards import Rewards, make_reward

if TYPE_CHECKING:
    from surgery.training.context import Context


def evaluate(context: Context, rows: Rows) -> dict[str, float]:
    """Metrics on the first `evaluate.n` of `rows`: accuracy where they have answers, nll where completions."""
    settings, recipe = context.recipe.evaluate, context.recipe
    chosen = [rows.row(i) for i in range(int(min(settings.n, rows.size)))]
    found: dict[str, float] = {}
    if "answer" in rows.columns and recipe.parallel != "fsdp2":  # sharded models don't decode: see distributed.py
        new = settings.max_new_tokens or recipe.rollouts.max_new_tokens
        greedy = LocalGenerator(
            context.policy.decoder(),
            context.tokenizer,
            Sampling(new, temperature=0, stop=recipe.rollouts.stop, batch_size=settings.batch_size),
        )
        mine = context.world.share(chosen)
        prompts = encoded_prompts(context.tokenizer, [row["prompt"] for row in mine], recipe.chat)
        drawn = greedy(prompts, 1, [0] * len(prompts)) if prompts else []
        values = Rewards({"accuracy": (make_reward("accuracy"), 1.0)}).score(mine, drawn).total if drawn else []
        scored = [v for part in context.world.gather(values) for v in part if v is not None]
        found["accuracy"] = sum(scored) / max(1, len(scored))
    if "completion" in rows.columns:
        batch = context.encode(chosen)
        log_probs = context.scores(batch)["log_probs"]
        found["nll"] = float(-(log_probs * batch.mask).sum() / batch.mask.sum())
    return found
