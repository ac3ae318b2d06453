"""The decoder as pure functions, its parameters, and their layout and storage.

`transformer`: the forward pass with and without a KV cache (`cache`); `attention` its attention, with its
implementations `chunked_attention` and `attention_kernels`. `log_probs`: log-probabilities from hidden states. `lora`:
low-rank adapters. `layouts`, `rows`, `sharding`, `placement`: layouts of weights and rows in memory and over devices.
`abstract`: bytes of models that are not there. `checkpoint`: training states on disk. `files`: other programs' formats.

Read `transformer`, `log_probs`, `sharding`.
"""
