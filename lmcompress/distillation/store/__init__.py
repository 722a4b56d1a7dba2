"""A store of a teacher's outputs on disk, so that it runs over the data once instead of in every epoch.

Rows are found by their content: the key is a hash of the row's unpadded tokens. So the order, the batches, the padding,
the number of processes and the subset of the data do not matter, and a row whose text or tokenisation has changed
is reported as missing.

A folder holds ``meta.json`` (:class:`StoreMeta`), ``index.safetensors`` (keys, lengths, and logits of one vector per
row) and ``shard-00000.safetensors``, ... (per-token entries, rows concatenated without padding).
"""

from lmcompress.distillation.store.format import StoreMeta, row_keys, teacher_fingerprint
from lmcompress.distillation.store.reader import TeacherStore, TopK, expand_top_k

__all__ = ["StoreMeta", "TeacherStore", "TopK", "expand_top_k", "row_keys", "teacher_fingerprint"]
