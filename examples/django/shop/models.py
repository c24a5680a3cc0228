"""A customer with a sealed email, found by its fingerprint."""

from django.db import models

from .fields import FingerprintField, SealedTextField


class Customer(models.Model):
    name = models.TextField()
    email = SealedTextField(key="pii", context="customer.email")
    email_fp = FingerprintField(of="email", key="email_lookup")
