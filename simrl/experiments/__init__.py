"""One experiment, whatever its scene: settings -> stages -> results.

`experiment` runs it. `plan` lists its stages and `work` does those in which agents talk. `scene` says what a scene is;
`concierge` (with `concierge_settings`, `concierge_people`, `concierge_setup`, `concierge_stages`) and `pretrained`
(with `pretrained_settings`, `pretrained_data`, `pretrained_agents`, `pretrained_simulators`, `pretrained_rewards`,
`replies`) are the two that there are. `settings`, `sources` (models and data), `judges` and `endpoints`, `fitting`
(fine-tuning and reward models, whose rows `kept_rows` keeps), `outputs` (what stages leave), `checks`, `memory` (does
it fit), `banner` and `results` serve them. `forecasts` and `forecast_results` know of a simulator what can be known
before anything is trained against it; `replays` put it in people's place; `cards` reads a run of any state.

Read `plan`, `scene`, `pretrained`.
"""
