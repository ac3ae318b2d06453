"""A study's votes -> report.html, reasons.html, figures/ and results.json.

`write` reads a store and writes them. `page` has the sections of the report, with `figures`; `reasons` is the page on
which single votes are read, with the replies and the reasons given. Parts of pages are those of `evaluation.report`.
"""
