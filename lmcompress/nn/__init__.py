"""Modules that compute with fewer numbers than a full matrix: factors, groups, local mixing. No model is known here."""
