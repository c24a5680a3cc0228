"""A customer with a sealed email and its fingerprint, both registered for re-encryption."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table(
        "customer",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("email", sa.LargeBinary, nullable=False),
        sa.Column("email_fp", sa.LargeBinary, nullable=False, index=True),
    )
    op.execute(
        """SELECT rekey.register_column('customer', 'email', $$'customer.email'$$),
                  rekey.register_fingerprint('customer', 'email_fp', 'email', 'email_lookup',
                                             'pii', 'lower($1)')"""
    )


def downgrade():
    op.execute(
        """SELECT rekey.unregister_column('customer', 'email_fp'),
                  rekey.unregister_column('customer', 'email')"""
    )
    op.drop_table("customer")
