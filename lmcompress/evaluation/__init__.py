"""Evaluation: GLUE metrics, perplexity, size on disk, latency and memory. Needs no trainer and no network."""

from lmcompress.activations.running import showing_progress as showing_progress
from lmcompress.evaluation.memory import Memory as Memory
from lmcompress.evaluation.memory import measure_peak_memory as measure_peak_memory
from lmcompress.evaluation.memory import peak_memory as peak_memory
from lmcompress.evaluation.metrics import GLUE_METRICS as GLUE_METRICS
from lmcompress.evaluation.metrics import METRICS as METRICS
from lmcompress.evaluation.metrics import compute_metrics as compute_metrics
from lmcompress.evaluation.metrics import glue_metrics as glue_metrics
from lmcompress.evaluation.metrics import glue_score as glue_score
from lmcompress.evaluation.metrics import predictions_from_logits as predictions_from_logits
from lmcompress.evaluation.perplexity import Perplexity as Perplexity
from lmcompress.evaluation.perplexity import perplexity as perplexity
from lmcompress.evaluation.predict import evaluate_classifier as evaluate_classifier
from lmcompress.evaluation.predict import predict as predict
from lmcompress.evaluation.size import Size as Size
from lmcompress.evaluation.size import TensorInfo as TensorInfo
from lmcompress.evaluation.size import WeightBytes as WeightBytes
from lmcompress.evaluation.size import parameter_count as parameter_count
from lmcompress.evaluation.size import size_on_disk as size_on_disk
from lmcompress.evaluation.size import stream_table as stream_table
from lmcompress.evaluation.size import tensor_table as tensor_table
from lmcompress.evaluation.size import weight_bytes as weight_bytes
from lmcompress.evaluation.speed import LatencyRow as LatencyRow
from lmcompress.evaluation.speed import compare_latency as compare_latency
from lmcompress.evaluation.speed import machine as machine
from lmcompress.evaluation.speed import verdict as verdict
