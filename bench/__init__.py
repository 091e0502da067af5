"""Measurements, as ratios in one run against the bare tools."""
