"""Distillation: losses, matches, teachers, and the method that adds them to a training run."""

from lmcompress.distillation.config import Contrast, DistillationConfig, EmdMatch, Match, OnPolicy, TemperatureSchedule
from lmcompress.distillation.losses import LogitLoss
from lmcompress.distillation.matches import MatchLoss
from lmcompress.distillation.method import Distillation
from lmcompress.distillation.presets import quantgpt, ternarybert
from lmcompress.distillation.store import TeacherStore
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.distillation.teachers import LiveTeacher, load_teacher
from lmcompress.distillation.textbrewer import read_textbrewer

__all__ = [
    "Contrast",
    "Distillation",
    "DistillationConfig",
    "EmdMatch",
    "LiveTeacher",
    "LogitLoss",
    "Match",
    "MatchLoss",
    "OnPolicy",
    "StoredTeacher",
    "TeacherStore",
    "TemperatureSchedule",
    "load_teacher",
    "quantgpt",
    "read_textbrewer",
    "ternarybert",
]
