"""The model and the engine of the example: a customer with a sealed email."""

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates

from sealed import Fingerprint, Sealed

# Connects as the PG* variables say. Without prepared statements, so that PgBouncer's transaction
# mode works: each transaction may run on another server connection.
engine = create_engine("postgresql+psycopg://", connect_args={"prepare_threshold": None})


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(Sealed("pii", "customer.email"))
    email_fp: Mapped[str] = mapped_column(Fingerprint("email_lookup"), index=True, deferred=True)

    @validates("email")
    def set_fingerprint(self, _, email):
        self.email_fp = email
        return email
