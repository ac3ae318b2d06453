"""The revisions, oldest first: `events`, `known_by`."""
