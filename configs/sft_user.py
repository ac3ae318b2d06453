"""Fine-tunes a user simulator on people's turns; the first stage of smollm2.py, alone.

    python -m simrl.main --config=configs/sft_user.py --config.data.folder=FOLDER

Sizes as of smollm2.py: `sft_user.py:cpu`, `sft_user.py:smoke`. The simulator is in sft/user of the run directory;
`tools/export.py` makes a Hugging Face folder of it.
"""

from ml_collections import ConfigDict

from configs import smollm2


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: a size of smollm2.py."""
    whole = smollm2.get_config(arg)
    return ConfigDict(
        {'job': 'sft_user', **{field: whole[field] for field in ('model', 'data', 'user_sft', 'compute')}}
    )
