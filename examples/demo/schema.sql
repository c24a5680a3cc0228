-- The demo's application: customers whose personal columns are sealed. Run once by demo.sh as
-- the superuser of a throwaway cluster, in an empty database.
-- What a customer's values are follows from id and rev alone, so that every reader can tell
-- whether the value that it opened is the right one: nothing is compared with stored plaintext.

CREATE EXTENSION pg_rekey;
SELECT rekey.init_root_key() AS root_id;
SELECT rekey.create_key('pii', comment => 'personal data of customers') AS slot_id;

-- The application seals and opens. The rotator can rotate, and cannot read a single value.
CREATE ROLE shop_app LOGIN;
CREATE ROLE shop_rotator LOGIN;
SELECT rekey.grant_key('pii', 'shop_app', ARRAY['encrypt', 'decrypt']);
SELECT rekey.grant_key('pii', 'shop_rotator', ARRAY['rotate']);

CREATE TABLE customers (
    id            bigint PRIMARY KEY,
    rev           integer NOT NULL DEFAULT 0,   -- how often the application changed this customer
    name_c        bytea NOT NULL,               -- text
    email_c       bytea NOT NULL,               -- text
    national_id_c bytea NOT NULL,               -- text
    notes_c       bytea NOT NULL,               -- jsonb
    salary_c      bytea NOT NULL                -- numeric
);
GRANT SELECT, INSERT, UPDATE ON customers TO shop_app;

-- STABLE as `||` over other types is, so that the planner can inline these.
CREATE FUNCTION customer_name(id bigint) RETURNS text STABLE LANGUAGE sql AS $$
    SELECT (ARRAY['Ada', 'Blaise', 'Chien-Shiung', 'Dorothy', 'Émilie', 'Friedrich', 'Grace',
                  'Hedy'])[1 + id % 8]
        || ' ' || (ARRAY['Lovelace', 'Pascal', 'Wu', 'Hodgkin', 'du Châtelet', 'Gauß', 'Hopper',
                         'Lamarr'])[1 + id / 8 % 8]
        || ' ' || id
$$;
CREATE FUNCTION customer_email(id bigint, rev integer) RETURNS text STABLE LANGUAGE sql AS $$
    SELECT 'customer.' || id || '.' || rev || '@example.org'
$$;
CREATE FUNCTION customer_national_id(id bigint) RETURNS text STABLE LANGUAGE sql AS $$
    SELECT upper(substr(md5('national id ' || id), 1, 12))
$$;
CREATE FUNCTION customer_notes(id bigint, rev integer) RETURNS jsonb STABLE LANGUAGE sql AS $$
    SELECT jsonb_build_object('customer', id, 'calls', rev,
                              'note', 'call no. ' || rev || ' was fine')
$$;
CREATE FUNCTION customer_salary(id bigint, rev integer) RETURNS numeric STABLE LANGUAGE sql AS $$
    SELECT (2000000 + (id * 7919 + rev * 104729) % 9000000)::numeric / 100
$$;

-- What the readers call: the wrong value is an error, and so counts against the demo.
CREATE FUNCTION check_customer(id bigint, rev integer, name text, email text, national_id text,
                               notes jsonb, salary numeric) RETURNS boolean
    LANGUAGE plpgsql AS $$
BEGIN
    IF name IS DISTINCT FROM customer_name(id)
       OR email IS DISTINCT FROM customer_email(id, rev)
       OR national_id IS DISTINCT FROM customer_national_id(id)
       OR notes IS DISTINCT FROM customer_notes(id, rev)
       OR salary IS DISTINCT FROM customer_salary(id, rev)
    THEN
        RAISE EXCEPTION 'customer % revision % opened to another value', id, rev;
    END IF;
    RETURN true;
END
$$;
