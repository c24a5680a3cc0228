"""Tries everything once for each line it reads, between two of which the test rotates the keys."""

import os
import sys

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
django.setup()

from shop.models import Customer  # noqa: E402

names = []
for name in map(str.strip, sys.stdin):
    Customer.objects.create(name=name, email=f"{name}@first.example.org")
    customer = Customer.objects.get(email_fp=f"{name}@first.example.org")
    customer.email = f"{name}@example.org"
    customer.save()
    names.append(name)
    assert not Customer.objects.filter(email_fp=f"{name}@first.example.org").exists()
    for name in names:
        customer = Customer.objects.get(email_fp=f"{name}@EXAMPLE.org")
        assert (customer.name, customer.email) == (name, f"{name}@example.org")
    print(len(names), flush=True)
