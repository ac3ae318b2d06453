"""Rehearses a study: made-up participants go through the real pages over HTTP, and every answer is accounted for.

    python -m tools.rehearse http://127.0.0.1:8080 --store=sqlite:///rehearsal.sqlite --participants=40
    python -m tools.rehearse URL --store=... --participants=283 --at_once=283 --leave=.02 --double=.1 --reload=.1
    python -m tools.rehearse URL --store=... --person='{"url": "http://127.0.0.1:8000/v1", "model": "persona"}'

The study runs in its mode `rehearsal` (`python -m tools.study --config.mode=rehearsal`), with a store of its own, and
is open to a panel. Participants are scripted, or with `--person` a model behind an endpoint writes their messages,
votes and texts; it must support JSON schemas. They read nothing but the pages, and try what people do:
they leave for good (`--leave`, the chance at each page), click twice at once (`--double`), reload, go Back and send an
old form again (`--reload`, `--back`), continue on a second device (`--device`), fail the comprehension check
(`--fail`). A server that is gone is waited for: it may be killed and started again meanwhile.

At the end it prints times of the server by page and action, models aside, and what became of the participants. Then it
holds what the participants saw confirmed against the store: each confirmed answer is there once, in order, as it was
sent; replies were shown on the sides that the store has; nothing is there that nobody sent. Any difference is an error,
exit code 1. Last comes what the votes say about sizes: ties and clustering, pooled over pairs so that nothing about a
preference is given away. The administrators' overview has the number of participants that the plan then needs.

The same command again has participants who did not come to their end return and continue; `--seed` makes others. A
scripted participant needs no time to read: screens will find them too fast. `--pace=1` has them wait as people do.
"""
