"""`simrl.main` of a process that has another version of JAX, as far as it says."""

import jax
from absl import app

from simrl import main

if __name__ == '__main__':
    jax.__version__ = '0.9.99'
    main.define_flags()
    app.run(main.main, flags_parser=main.parse_flags)
