"""Models: the USM-style encoder and the CTC recogniser on top of it."""
