"""The proof of a family: what lmcompress promises for a model, checked on a tiny random copy of its config.

A family is a description, and a wrong description computes something else without a word. So every family passes
:func:`prove`, in the tests and in the table of the documentation; what fails for a family is refused for it.
"""

from lmcompress.proof.claims import CLAIMS, Claim
from lmcompress.proof.discovery import adopt, discover
from lmcompress.proof.prove import Outcome, Proof, prove
from lmcompress.proof.tiny import tiny_config, tiny_model, typical_config

__all__ = [
    "CLAIMS",
    "Claim",
    "Outcome",
    "Proof",
    "adopt",
    "discover",
    "prove",
    "tiny_config",
    "tiny_model",
    "typical_config",
]
