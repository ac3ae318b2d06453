"""A keyed hash of a participant's panel id, by which they are known after their data was deleted.

On the way down it is lost: who had their data deleted could then enter once more.
"""

import hashlib
import hmac

import sqlalchemy as sa
from alembic import op

revision = 'known_by'
down_revision = 'events'


def upgrade() -> None:
    op.add_column('identities', sa.Column('known_by', sa.String(64), nullable=False, server_default=''))
    connection = op.get_bind()
    identities = sa.table('identities', *map(sa.column, ('participant', 'mode', 'panel_id', 'known_by')))
    key = bytes.fromhex(connection.scalar(sa.text('SELECT secret FROM study')) or '')
    for participant, mode, panel_id in connection.execute(sa.select(*list(identities.c)[:3])).all():
        # Those that were deleted before are known by nothing any more; the index wants a value of each.
        text = f'{mode} {panel_id}' if panel_id else f'deleted {participant}'
        known_by = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        connection.execute(
            sa.update(identities).where(identities.c.participant == participant).values(known_by=known_by)
        )
    op.create_index('identities_once', 'identities', ['known_by'], unique=True)


def downgrade() -> None:
    op.drop_index('identities_once', 'identities')
    op.drop_column('identities', 'known_by')
