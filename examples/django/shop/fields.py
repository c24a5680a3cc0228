"""Fields for pg_rekey: text in Python, envelopes and fingerprints in the database."""

from django.db import models


class SealedTextField(models.Field):
    """Seals what is written under a key and opens what is read. The context names the column."""

    def __init__(self, *args, key, context, **kwargs):
        super().__init__(*args, **kwargs)
        self.key = key
        self.context = context

    def deconstruct(self):
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, kwargs | {"key": self.key, "context": self.context}

    def db_type(self, connection):
        return "bytea"

    def get_placeholder(self, value, compiler, connection):
        return f"encrypt_col(%s, '{self.key}', '{self.context}')"

    def select_format(self, compiler, sql, params):
        return f"decrypt_col({sql}, '{self.context}')", params

    def get_lookup(self, name):
        # Envelopes of equal values differ: filter by the fingerprint instead.
        return super().get_lookup(name) if name == "isnull" else None


class FingerprintField(models.Field):
    """Keeps the fingerprint of another field's value in lower case; filter() finds either case."""

    def __init__(self, *args, of, key, **kwargs):
        super().__init__(*args, **{"db_index": True, "editable": False} | kwargs)
        self.of = of
        self.key = key

    def deconstruct(self):
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, kwargs | {"of": self.of, "key": self.key}

    def db_type(self, connection):
        return "bytea"

    def pre_save(self, instance, add):
        return getattr(instance, self.of)

    def get_placeholder(self, value, compiler, connection):
        return f"fingerprint_col(lower(%s), '{self.key}')"


@FingerprintField.register_lookup
class FingerprintExact(models.Lookup):
    lookup_name = "exact"

    def as_sql(self, compiler, connection):
        column, params = self.process_lhs(compiler, connection)
        key = self.lhs.output_field.key
        return f"{column} = ANY (rekey.fingerprints(lower(%s), '{key}'))", [*params, self.rhs]
