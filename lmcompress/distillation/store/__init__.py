"""A store on disk of what a teacher answers, so that it runs once over the data instead of once in every epoch.

Rows are found by their content: the key is a hash of the row's unpadded tokens. So the order, the batches, the padding,
the number of processes and the subset of the data do not matter, and a row whose text or tokenisation has changed
is not found instead of being wrong.

A folder holds ``meta.json`` (:class:`StoreMeta`), ``index.safetensors`` (keys, lengths, and logits of one vector per
row) and ``shard-00000.safetensors``, ... (whatever has one entry per token, rows laid end to end without padding).
"""

from lmcompress.distillation.store.format import StoreMeta, row_keys, teacher_fingerprint
from lmcompress.distillation.store.reader import TeacherStore, TopK, expand_top_k

__all__ = ["StoreMeta", "TeacherStore", "TopK", "expand_top_k", "row_keys", "teacher_fingerprint"]
