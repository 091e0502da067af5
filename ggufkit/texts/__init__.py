"""Texts to calibrate on and to measure with: files, rows, data sets, Python's own documentation."""
