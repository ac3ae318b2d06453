"""One experiment, whatever its scene: settings -> stages -> results.

`experiment` runs it. `plan` lists its stages and `work` does those in which agents talk. `scene` says what a scene is;
`concierge` (with `concierge_people` and `concierge_setup`) and `pretrained` are the two that there are. `settings`,
`sources` (models and data), `fitting` (fine-tuning and reward models), `outputs` (what stages leave), `checks`,
`banner` and `results` serve them.

Read `plan`, `scene`, `pretrained`.
"""
