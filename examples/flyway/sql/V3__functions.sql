-- What the application calls: key, context and normalisation stand here, in one place. The
-- functions run as their caller, whose privilege on the keys counts.
CREATE FUNCTION add_customer(name text, email text) RETURNS uuid
LANGUAGE sql AS $$
    INSERT INTO customer (id, name, email, email_fp)
    SELECT id, name, encrypt_col(email, 'pii', rekey.context('customer.email', id::text)),
           fingerprint_col(lower(email), 'email_lookup')
      FROM gen_random_uuid() AS id
    RETURNING id
$$;

CREATE FUNCTION customer_by_email(wanted text, OUT id uuid, OUT name text, OUT email text)
RETURNS SETOF record LANGUAGE sql STABLE AS $$
    SELECT id, name, decrypt_col(email, rekey.context('customer.email', id::text))
      FROM customer
     WHERE email_fp = ANY (rekey.fingerprints(lower(wanted), 'email_lookup'))
$$;

CREATE FUNCTION change_email(customer_id uuid, new_email text) RETURNS void
LANGUAGE sql AS $$
    UPDATE customer
       SET email = encrypt_col(new_email, 'pii', rekey.context('customer.email', id::text)),
           email_fp = fingerprint_col(lower(new_email), 'email_lookup')
     WHERE id = customer_id
$$;
