"""Tiny seeded checkpoints of the architectures that the pinned converter knows.

``recipes`` says what there is, as data: one row for each, with the verdict that is
expected of it. ``making`` turns a row into a checkpoint, ``running`` makes a GGUF of
that and compares the two, each in a process of its own, and
``python -m tests.architectures`` does so for all rows.
"""
