"""`surgery vector`: task vectors taken out, computed with, and put into models."""

from __future__ import annotations

from surgery.cli.frame import new_app

app = new_app(help="Task vectors: what fine-tuning changed. Take it out, look at it, compute with it, apply it.")
