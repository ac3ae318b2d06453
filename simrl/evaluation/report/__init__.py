"""Results -> one self-contained HTML page, figures and console tables.

`report` writes them; `sections` are the page's parts (`matrix` those of the matrix), `figures` its pictures, `summary`
its sentences and rows, and `page` the HTML around them. `card_page` is the page of a simulator's card.
"""
