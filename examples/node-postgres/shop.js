// Customers with a sealed email, over node-postgres: added, found by email, changed.
// Connects as the PG* variables say. Every value is a bound parameter; no statement has a name,
// so that PgBouncer's transaction mode works.

import pg from "pg";

const pool = new pg.Pool();

export async function add(name, email) {
  await pool.query(
    `INSERT INTO customer (id, name, email, email_fp)
     SELECT id, $1, encrypt_col($2, 'pii', rekey.context('customer.email', id::text)),
            fingerprint_col(lower($2), 'email_lookup')
       FROM gen_random_uuid() AS id`,
    [name, email],
  );
}

export async function find(email) {
  const { rows } = await pool.query(
    `SELECT name, decrypt_col(email, rekey.context('customer.email', id::text)) AS email
       FROM customer
      WHERE email_fp = ANY (rekey.fingerprints(lower($1), 'email_lookup'))`,
    [email],
  );
  return rows[0];
}

export async function changeEmail(from, to) {
  await pool.query(
    `UPDATE customer
        SET email = encrypt_col($2, 'pii', rekey.context('customer.email', id::text)),
            email_fp = fingerprint_col(lower($2), 'email_lookup')
      WHERE email_fp = ANY (rekey.fingerprints(lower($1), 'email_lookup'))`,
    [from, to],
  );
}

export const close = () => pool.end();
