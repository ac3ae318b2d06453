"""Events, identities and the study's one row."""

import sqlalchemy as sa
from alembic import op

revision = 'events'
down_revision = None


def upgrade() -> None:
    op.create_table(
        'events',
        sa.Column('number', sa.BigInteger().with_variant(sa.Integer, 'sqlite'), primary_key=True, autoincrement=False),
        sa.Column('participant', sa.String(64), nullable=False),
        sa.Column('version', sa.Integer, nullable=False),
        sa.Column('at', sa.Double, nullable=False),
        sa.Column('kind', sa.String(64), nullable=False),
        sa.Column('body', sa.Text, nullable=False),
        sa.UniqueConstraint('participant', 'version', name='events_once'),
    )
    op.create_table(
        'identities',
        sa.Column('participant', sa.String(64), primary_key=True),
        sa.Column('mode', sa.String(16), nullable=False),
        sa.Column('panel_id', sa.String(128), nullable=False),
        sa.Column('study_id', sa.String(128), nullable=False),
        sa.Column('session_id', sa.String(128), nullable=False),
    )
    op.create_table(
        'study',
        sa.Column('mode', sa.String(16), primary_key=True),
        sa.Column('secret', sa.String(64), nullable=False),
    )


def downgrade() -> None:
    for table in ('study', 'identities', 'events'):
        op.drop_table(table)
