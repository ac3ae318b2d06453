"""The decoder as pure functions, its parameters, and where they are stored.

`transformer`: the forward pass with and without a KV cache. `log_probs`: log-probabilities from hidden states. `lora`:
low-rank adapters. `layouts`, `rows`, `sharding`, `placement`: how weights and rows are laid out over devices.
`checkpoint`: states on disk. `files`: other programs' formats.

Read `transformer`, `log_probs`, `sharding`.
"""
