"""A blind study with people: two assistants answer side by side, and people say whose reply they prefer.

    python -m tools.study
    python -m tools.study fine_tuned=runs/smollm2/fine_tuned/seed-0 role_play=runs/smollm2/role_play/seed-0

Without names of models these two are compared, after `configs/smollm2.py` was run. A live study names its own texts
(`texts`: the researchers, the payment) and its panel's codes and address (`panel`) in a copy of this file.
"""

from ml_collections import ConfigDict

from simrl.run.config import to_config_dict
from simrl.study.settings import StudyModel, StudySettings

RUN = 'runs/smollm2'


def get_config(arg: str = '') -> ConfigDict:
    """The settings; an argument is another run with the same arms."""
    arms = ('fine_tuned', 'role_play')
    models = {arm: StudyModel(source=f'{arg or RUN}/{arm}/seed-0') for arm in arms}
    return to_config_dict(StudySettings(name='smollm2', models=models))
