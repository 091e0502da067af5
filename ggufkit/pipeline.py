"""The library: what the command line's verbs do, in the same words.

Every function takes values and a :class:`~ggufkit.progress.Progress`, and
returns values; nothing here prints. Rooms are imported inside the functions,
so that importing this module costs nothing.
"""
