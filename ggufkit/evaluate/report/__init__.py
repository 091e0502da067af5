"""The report: stored results gathered into a value, then written as HTML and Markdown.

``gather`` makes the value (:class:`~ggufkit.evaluate.report.values.Report`),
``recommend`` says which file to take and why, ``plots`` draws, ``html`` and
``markdown`` render, ``write`` puts both on disk.
"""
