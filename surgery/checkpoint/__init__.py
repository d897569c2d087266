"""Checkpoints on disk: a lazy reader, a streaming writer, adapters seen as checkpoints, and where a result came from.

| file               | what is in it                                                                        |
|--------------------|--------------------------------------------------------------------------------------|
| header.py          | the safetensors header: parsed with suspicion, written before the data               |
| reader.py          | `open_checkpoint`: a folder, a file, `base+adapter` or a hub name as a lazy `Source` |
| adapter.py         | a LoRA on a base, read row by row as if it were merged                               |
| pickled.py         | `.bin` files, only when asked for                                                    |
| writer.py          | `CheckpointWriter`: tensors in any order, from any thread, at known places           |
| companions.py      | config, tokenizer and model card: what travels with the weights                      |
| provenance.py      | `surgery.json`: inputs with checksums, recipe, versions, a report for every tensor   |
| vocabulary.py      | tokenizers compared by token string                                                  |
| token_alignment.py | several vocabularies in one order: which row comes from where                        |
| tokenizer_files.py | the tokenizer of such an order, written so that it loads                             |
| chat_templates.py  | chat templates by name, and the commonest among inputs                               |

Nothing here imports torch before a tensor is read.
"""

from surgery.checkpoint.header import TensorInfo, read_header
from surgery.checkpoint.reader import Checkpoint, Source, open_checkpoint
from surgery.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Source", "TensorInfo", "open_checkpoint", "read_header"]
