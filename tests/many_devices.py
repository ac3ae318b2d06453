"""The environment of a process with eight devices on one CPU."""

# Each device's programs run on threads of XLA's pools, which have as many threads as there are cores or devices, and a
# collective holds a thread until all devices have come. The pools are made larger (NPROC) so that threads are left to
# those that are waited for, no program is begun while one is under way, and a late device is waited for longer.
EIGHT_DEVICES = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '8',
    'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
    'NPROC': '32',
    'XLA_FLAGS': '--xla_cpu_collective_call_warn_stuck_timeout_seconds=60 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=500',
}
