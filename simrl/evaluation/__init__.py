"""From outcomes of conversations to numbers that can be believed.

`statistics`: intervals and tests. `win_rate`, `people`: comparisons of assistants on the same people. `comparisons`:
over training seeds. `gap_recovered`: gain as a share of the oracle's. `fidelity`: likelihood of people's turns under a
simulator. `controls`: negative controls. `results`: the JSON files of a run; `report`: the page made from them.

Read `statistics`, `comparisons`, `results`.
"""
