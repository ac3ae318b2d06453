"""The environment of a process with eight devices on one CPU."""

# Where other work takes the cores, a device can be late for the others: it is waited for longer than XLA would, and no
# program is begun while one is under way, so that those that wait leave threads to those that work.
EIGHT_DEVICES = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '8',
    'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
    'XLA_FLAGS': '--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=500',
}
