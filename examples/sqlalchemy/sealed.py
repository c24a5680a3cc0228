"""Column types for pg_rekey: text in Python, envelopes and fingerprints in the database."""

from sqlalchemy import LargeBinary, Text, any_, func, literal, type_coerce
from sqlalchemy.types import TypeDecorator


class Sealed(TypeDecorator):
    """Seals what is written under a key and opens what is read. The context names the column."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, key, context):
        super().__init__()
        self.key = key
        self.context = context

    def bind_expression(self, value):
        text = type_coerce(value, Text)
        return func.encrypt_col(text, self.key, self.context)

    def column_expression(self, column):
        return func.decrypt_col(column, self.context, type_=Text)


class Fingerprint(TypeDecorator):
    """Stores the fingerprint of a text in lower case; == finds it in either case."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, key):
        super().__init__()
        self.key = key

    def bind_expression(self, value):
        return func.fingerprint_col(func.lower(type_coerce(value, Text)), self.key)

    class comparator_factory(TypeDecorator.Comparator):
        def __eq__(self, text):
            wanted = func.lower(literal(text, Text))
            fingerprints = func.rekey.fingerprints(wanted, self.type.key)
            return type_coerce(self.expr, LargeBinary) == any_(fingerprints)
