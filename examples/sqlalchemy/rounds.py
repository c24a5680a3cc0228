"""Tries everything once for each line it reads, between two of which the test rotates the keys."""

import sys

from sqlalchemy import select
from sqlalchemy.orm import Session

from shop import Customer, engine


def find(session, email):
    return session.scalars(select(Customer).where(Customer.email_fp == email)).one_or_none()


names = []
for name in map(str.strip, sys.stdin):
    with Session(engine) as session, session.begin():
        session.add(Customer(name=name, email=f"{name}@first.example.org"))
    with Session(engine) as session, session.begin():
        find(session, f"{name}@first.example.org").email = f"{name}@example.org"
    names.append(name)
    with Session(engine) as session:
        assert find(session, f"{name}@first.example.org") is None
        for name in names:
            customer = find(session, f"{name}@EXAMPLE.org")
            assert (customer.name, customer.email) == (name, f"{name}@example.org")
    print(len(names), flush=True)
