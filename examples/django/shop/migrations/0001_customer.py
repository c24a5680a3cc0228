"""A customer with a sealed email and its fingerprint, both registered for re-encryption."""

from django.db import migrations, models

import shop.fields


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            name="Customer",
            fields=[
                ("id", models.BigAutoField(primary_key=True, auto_created=True, serialize=False, verbose_name="ID")),
                ("name", models.TextField()),
                ("email", shop.fields.SealedTextField(key="pii", context="customer.email")),
                ("email_fp", shop.fields.FingerprintField(of="email", key="email_lookup")),
            ],
        ),
        migrations.RunSQL(
            """SELECT rekey.register_column('shop_customer', 'email', $$'customer.email'$$),
                      rekey.register_fingerprint('shop_customer', 'email_fp', 'email',
                                                 'email_lookup', 'pii', 'lower($1)')""",
            """SELECT rekey.unregister_column('shop_customer', 'email_fp'),
                      rekey.unregister_column('shop_customer', 'email')""",
        ),
    ]
