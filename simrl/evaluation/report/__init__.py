"""Results -> self-contained HTML pages, figures and console tables.

`report` writes them. Of a run: `sections` are the page's parts (`tables` those of comparisons, `matrix` of the matrix),
`summary` its sentences and rows, `page` the HTML around them; `gallery` has the figures, of `figures`, `lengths` and
`utility`, each a `drawing`; `browse` is the page of conversations. `several` is the page of several runs, `card_page`
that of a simulator's card. Of what tools add to a run: `study`, `judges` with `judge_figures`, `wildbench`.
"""
