"""`surgery generate`: what a model says, or a formula of models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import composed, frame, models, prompts
from surgery.cli.completions import Told
from surgery.cli.composed import (
    DRAWN,
    BatchSize,
    Chat,
    ChatFor,
    Device,
    Dtype,
    Expr,
    Foreign,
    MaxNewTokens,
    Missing,
    Model,
    Named,
    Scaled,
    TokenFilter,
)  # fmt: skip
from surgery.cli.frame import Force, command, option
from surgery.cli.prompts import Workers
from surgery.errors import SurgeryError


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "generate")(generate)


ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

Temperature = Annotated[float, option("0 is greedy.", panel=DRAWN, min=0)]
TopK = Annotated[int, option("Only the likeliest K tokens; 0 is off.", panel=DRAWN, min=0)]
TopP = Annotated[float, option("Only the likeliest that hold this probability together.", panel=DRAWN)]
MinP = Annotated[float, option("Only those as likely as this share of the likeliest.", panel=DRAWN)]
BeamCount = Annotated[int | None, option("Beam search with so many.", panel=DRAWN, min=1, default="none")]
Samples = Annotated[int, option("Completions of each prompt.", "--n", panel=DRAWN, min=1)]
Seed = Annotated[int, option("Of the draws.", panel=DRAWN)]
Stop = Annotated[list[str] | None, option(r"Text that ends a completion (\\n is a new line); repeatable.", panel=DRAWN)]
Speculate = Annotated[
    str | None, option("NAME drafts, the others judge: the same law, sooner.", panel=DRAWN, metavar="NAME")
]
Conjugate = Annotated[
    str | None,
    option("Ask in other letters, and read the answer back: rot13, reverse, leetspeak, pig_latin.", panel=DRAWN),
]


def generate(
    model: Model = None,
    expr: Expr = None,
    named: Named = None,
    prompt: Annotated[list[str] | None, option("A text to complete; repeatable.", "--prompt", "-p")] = None,
    file: Annotated[
        Path | None, option("Texts: a line each, or rows with `prompt`.", "--prompts", metavar="FILE")
    ] = None,
    stream: Annotated[bool, option("Show tokens as they come.", "--stream")] = False,
    scores: Annotated[bool, option("Log-probabilities of each token, by model too.", "--scores")] = False,
    out: Annotated[
        Path | None, option("Keep completions there, a row each.", "--out", "-o", metavar="FILE.jsonl")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    beams: BeamCount = None,
    n: Samples = 1,
    seed: Seed = 0,
    stop: Stop = None,
    speculate: Speculate = None,
    conjugate: Conjugate = None,
    batch_size: BatchSize = 32,
    chat: Chat = False,
    chat_for: ChatFor = None,
    filter: TokenFilter = None,
    scaled: Scaled = None,
    missing: Missing = "mask",
    foreign: Foreign = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Workers = None,
    force: Force = False,
) -> None:
    """Complete prompts with a model, or with a formula of several that read the same response in lock step.

    Ctrl-C or an error in a later completion leaves what is there, its scores included.

    \b
    Examples:
    surgery generate tiny-chain --prompt 'm 12+34='
    surgery generate --expr 'large + 1.0*(tuned - small)' --model large=tiny-base --model tuned=tiny-small-chain
        --model small=tiny-small-base --prompt 'c 5264:' --scores
    surgery generate --expr "tuned - 'tiny-base'" --model tuned=tiny-chain --filter plausible=0.1@tuned
        --prompt 'c' --temperature 1 --n 8
    surgery generate --expr 'big + chat - small' ... --chat-for chat --prompts questions.txt --out answers.jsonl
    """
    given = models.named(named or [], "As in --model large=DIR.")
    asked = composed.composition(model, expr, given)
    settings = composed.Settings(
        chat, chat_for or [], scaled or [], dtype, device, filter, missing, foreign or [], speculate
    )
    composed.checked([asked], given, settings)
    _outputs(out, force)
    _fitting(stream, speculate, conjugate, beams, n, temperature)
    texts = _texts(prompt, file)
    transform = _transform(conjugate, texts)

    import torch

    from surgery import logits
    from surgery.decoding import Sampling
    from surgery.logits.generate import room

    if threads is not None:
        torch.set_num_threads(threads)
    stops = tuple(_unescaped(text) for text in stop or ())
    drawn = Sampling(1, temperature, top_p, top_k, min_p, stops, batch_size)  # what is wrong is told before loading
    with composed.opened(asked, given, settings) as (ensemble, members):
        said = [transform.encode(text) for text in texts] if transform else texts
        how: Any = {"sampling": replace(drawn, max_new_tokens=max_new_tokens or room(ensemble, said)), "seed": seed}
        told = Told(texts, ensemble, n, scores, transform)
        plain = [name for name, one in members.items() if one.base.prompt == "plain"]
        if plain and not all(isinstance(text, str) for text in texts):
            frame.notes([f"Of chats, {', '.join(plain)} read the plain text."])
        if stream and speculate is None:
            told.stream(said, how)
        else:
            with nullcontext() if stream else frame.progress("Writing") as advance:
                done: dict[int, Any] = {}
                how |= {"members": scores, "progress": advance, "each": done.__setitem__}
                try:
                    if speculate is not None:
                        show = told.show if stream else None
                        told.add(logits.speculate(ensemble, said, draft=members[speculate], show=show, **how))
                    else:
                        told.add(logits.generate(ensemble, said, group=n, beams=beams, **how))
                except Exception as error:
                    told.failed(error, done)
                finally:
                    told.end_line()
    if out is not None:
        told.write(out)
    told.tell({"model" if asked.single else "expr": asked.text, "models": asked.models, "seed": seed}, out)
    whole = f"{told.whole} of {frame.count(len(texts) * n, 'completion')} were whole."
    if told.error is not None:  # what there is has been told and written
        frame.note(whole)
        raise told.error
    if told.stopped:
        frame.STATE.on_stop = whole
        raise KeyboardInterrupt


# ---- what is asked, and where it goes ------------------------------------------------------------------------------


def _fitting(
    stream: bool, speculate: str | None, conjugate: str | None, beams: int | None, n: int, temperature: float
) -> None:
    """Raises `SurgeryError` for ways to decode that exclude each other."""
    if stream and beams:
        raise SurgeryError("--stream shows completions token by token, and of beams none is sure before its end.")
    if stream and conjugate:
        raise SurgeryError("--conjugate reads an answer back when it is whole: not with --stream.")
    if speculate and (n > 1 or beams):
        raise SurgeryError("--speculate gives one completion of a prompt: not with --n or --beams.")
    if n > 1 and temperature == 0 and not beams:
        raise SurgeryError(f"Greedy decoding gives the same {n} times.", hint="Draw them, --temperature 1, or --beams.")
    if beams and n > beams:
        raise SurgeryError(f"Of {beams} beams come at most {beams} completions, and --n asks for {n}.")


def _texts(prompt: list[str] | None, file: Path | None) -> list[Any]:
    found: list[Any] = [*(prompt or []), *(prompts.texts(file) if file is not None else [])]
    if not found:
        raise SurgeryError(
            "There is nothing to complete.", hint="Give a text, --prompt TEXT, or a file, --prompts FILE."
        )
    return found


def _transform(name: str | None, texts: Sequence[Any]) -> Any:
    if name is None:
        return None
    from analysis.conjugate import TRANSFORMS

    if not all(isinstance(text, str) for text in texts):
        raise SurgeryError("--conjugate writes texts in other letters, and a prompt is a chat.")
    return TRANSFORMS.lookup(name)


def _unescaped(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)


def _outputs(out: Path | None, force: bool) -> None:
    if out is None:
        return
    if out.suffix != ".jsonl":
        raise SurgeryError(f"--out writes a .jsonl file, and '{out}' is none.")
    if out.exists() and not force:
        raise SurgeryError(f"The output {out} exists already.", hint="Choose another name, or pass --force.")
    if not out.parent.is_dir():
        raise SurgeryError(f"There is no folder {out.parent}.")
