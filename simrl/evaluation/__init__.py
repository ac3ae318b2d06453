"""Outcomes of conversations -> estimates with intervals, and the report.

`statistics`: intervals over people; `shares`: those of shares near 0 and 1. `seeds`: over training seeds; `blocks`: for
few of them; `crossed`: over seeds and people at once; `multiplicity`: several tests; `power`: sample sizes. `win_rate`,
`outcomes`: assistants on the same examples. `preferences`: win rates of votes by people or judges; `vote_models`: their
regressions; `ranking`: several assistants on one scale; `position`: judges who see both orders, and panels;
`length_control`: win rates at equal lengths. `comparisons`: arms over training seeds. `gap_recovered`: an arm's gain as
a share of the oracle's. `fidelity`: simulators beside people, turn by turn, and likelihoods of people's messages.
`forecast`: utility before training. `controls`: negative controls. `pairwise`: judges who see two responses.
`wildbench`: real tasks with checklists. `matrix`: every assistant with every simulator. `results`: the JSON files of a
run; `report`: the page made of them; `verdicts`: what judges and people said, in short. `card`: all that is known of
one simulator.

Read `statistics`, `seeds`, `outcomes`, `comparisons`, `results`.
"""
