"""Layers: compressed projections and the parts of a USM-style Conformer."""
