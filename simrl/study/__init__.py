"""The blind user study: people talk to two assistants at once and say after each message whose reply they prefer.

All that happens is an event; state is a fold of the events. In order of reading: `settings`; `texts` and `text_files`;
`events` (what can happen), `participant` (a participant's events -> where they are); `steps` (an action -> events;
`assignment`), `store` (events on disk; `database`, `rows`, `backup`), `running` (the study in this process: stored
first, then known; `register`, `history`, `writer`), `turns` (a message -> two replies; `models`, `probe`, `moderation`,
`names`); `app` and its pages, from the browser inwards; `admin` (`panel`, `overview`, `plan`: what may be known before
the end; `screening`), `looks` (at results; `admin_looks`); `screens` (flags with reasons), `votes`, `analysis`,
`departures` (from the frozen plan), `report`, `export` and `tables` (files; `downloads`).
Programs: `tools/study.py` (the server), `tools/study_store.py` (backups), `tools/study_report.py`, `tools/rehearse.py`.
"""
