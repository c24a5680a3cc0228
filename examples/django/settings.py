"""The least that the example needs. Connects as the PG* variables say."""

import os

INSTALLED_APPS = ["shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["PGDATABASE"],
        # For PgBouncer in transaction mode: a cursor of the server lives in one connection.
        "DISABLE_SERVER_SIDE_CURSORS": True,
        # By default values are literals in the statements that Django sends, and so in the
        # server's log. This binds them. Needs psycopg 3.
        "OPTIONS": {"server_side_binding": True},
    }
}
