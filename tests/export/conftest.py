"""Quiet exporters."""

import logging

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_traces():
    # torch writes its traces for whoever listens to all loggers, as pytest does; that takes half of the time
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
