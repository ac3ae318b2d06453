"""Results -> one self-contained HTML page, figures and console tables.

`report` writes them; `sections` are the page's parts, `figures` its pictures, `summary` its sentences and rows, and
`page` the HTML around them.
"""
