"""Checkpoints on disk: a lazy reader, a streaming writer, adapters seen as checkpoints, and where a result came from.

| file          | what is in it                                                                       |
|---------------|-------------------------------------------------------------------------------------|
| header.py     | the safetensors header: parsed with suspicion, written before the data              |
| reader.py     | `open_checkpoint`: a folder, a file, `base+adapter` or a hub name as a lazy `Source` |
| adapter.py    | a LoRA on a base, read row by row as if it were merged                              |
| pickled.py    | `.bin` files, only when asked for                                                   |
| writer.py     | `CheckpointWriter`: tensors in any order, from any thread, at known places          |
| companions.py | config, tokenizer, model card and provenance: what travels with the weights         |
| vocabulary.py | tokenizers compared and aligned by token string                                     |

Nothing here imports torch before a tensor is read.
"""

from surgery.checkpoint.header import TensorInfo, read_header
from surgery.checkpoint.reader import Checkpoint, Source, open_checkpoint
from surgery.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Source", "TensorInfo", "open_checkpoint", "read_header"]
