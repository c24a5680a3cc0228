//! A schema with foreign keys, partitions, triggers and views, before and after three of its
//! columns are sealed behind views of the tables' names: every query gives the same answer.

use std::sync::OnceLock;

use postgres::Client;
use rekey_tests::{Ask, Cluster, Database, Options};

const SCHEMA: &str = include_str!("schema.sql");

/// Views of the application: made again when a column beneath them gets another type.
const VIEWS: &str = "
    CREATE VIEW customer_list AS
        SELECT c.customer_id, c.full_name, c.email, a.phone, ci.name AS city, co.name AS country,
               CASE WHEN c.active THEN 'active' ELSE '' END AS notes
          FROM customer c JOIN address a USING (address_id) JOIN city ci USING (city_id)
          JOIN country co USING (country_id);
    CREATE VIEW sales_by_store AS
        SELECT s.store_id, sum(p.amount) AS total, count(*) AS payments
          FROM payment p JOIN customer c USING (customer_id) JOIN store s USING (store_id)
         GROUP BY s.store_id;";

/// What the application asks. Every cell is compared.
const QUERIES: [&str; 16] = [
    "SELECT * FROM customer_list ORDER BY customer_id",
    "SELECT * FROM sales_by_store ORDER BY store_id",
    "SELECT customer_id, store_id, first_name, last_name, email, address_id, active, full_name \
       FROM customer ORDER BY email NULLS FIRST, customer_id",
    "SELECT c.full_name FROM customer c WHERE email = 'user17@example.org'",
    "SELECT c.full_name FROM customer c WHERE email LIKE '%7@example%' ORDER BY 1",
    "SELECT count(*), count(email), count(DISTINCT email) FROM customer",
    "SELECT ci.name, count(a.phone), min(a.phone) FROM address a JOIN city ci USING (city_id) \
      GROUP BY ci.name HAVING count(*) > 1 ORDER BY 1",
    "SELECT date_trunc('month', paid_on)::date, sum(amount), round(avg(amount), 3), max(amount) \
       FROM payment GROUP BY 1 ORDER BY 1",
    "SELECT customer_id, amount, rank() OVER (PARTITION BY customer_id \
            ORDER BY amount DESC, payment_id) \
       FROM payment WHERE amount > 3.5 ORDER BY 1, 3",
    "SELECT payment_id, pg_typeof(amount), amount FROM payment \
      WHERE paid_on BETWEEN '2024-06-25' AND '2024-07-05' ORDER BY payment_id",
    "WITH spent AS (SELECT customer_id, sum(amount) AS total FROM payment GROUP BY customer_id) \
     SELECT c.email, s.total FROM spent s JOIN customer c USING (customer_id) \
      WHERE s.total > (SELECT avg(total) FROM spent) ORDER BY s.total DESC, c.email",
    "SELECT f.title, f.rated, f.tags, sum(p.amount) FROM film f JOIN inventory i USING (film_id) \
       JOIN rental r USING (inventory_id) JOIN payment p USING (rental_id) \
      GROUP BY f.film_id ORDER BY 4 DESC, 1 LIMIT 5",
    "SELECT c.customer_id, l.amount FROM customer c CROSS JOIN LATERAL ( \
       SELECT amount FROM payment p \
       WHERE p.customer_id = c.customer_id ORDER BY paid_on DESC LIMIT 1) AS l ORDER BY 1",
    "SELECT a.phone FROM address a WHERE NOT EXISTS (SELECT FROM customer c \
       WHERE c.address_id = a.address_id) ORDER BY a.address_id",
    "SELECT coalesce(email, 'none'), upper(left(email, 5)) \
       FROM customer ORDER BY customer_id LIMIT 12",
    "SELECT jsonb_agg(jsonb_build_object('name', full_name, 'mail', email) ORDER BY customer_id) \
       FROM customer WHERE store_id = 2",
];

/// What it does. Each answers with rows, which are compared too.
const CHANGES: [&str; 12] = [
    "INSERT INTO address (street, city_id, phone) VALUES ('New Street', 2, '+00 555 9999') \
     RETURNING address_id, phone",
    "INSERT INTO customer (store_id, first_name, last_name, email, address_id) \
     VALUES (1, 'New', 'Customer', 'new@example.org', 43) \
     RETURNING customer_id, full_name, active, email",
    "INSERT INTO customer (store_id, first_name, last_name, address_id) \
     SELECT store_id, 'Copy of', last_name, address_id FROM customer \
      WHERE email = 'user1@example.org' \
     RETURNING customer_id, email",
    "UPDATE customer SET email = lower(first_name) || '@example.com' WHERE customer_id <= 3 \
     RETURNING customer_id, email, updated_at",
    "UPDATE customer SET active = false WHERE customer_id = 5 RETURNING email, updated_at",
    "UPDATE address SET phone = NULL WHERE address_id = 4 RETURNING phone, updated_at",
    "UPDATE payment SET amount = amount * 2 WHERE customer_id = 7 RETURNING payment_id, amount",
    "UPDATE payment SET paid_on = '2024-12-24' WHERE payment_id = 8 RETURNING payment_id, amount",
    "WITH rented AS (INSERT INTO rental (inventory_id, customer_id, rented) \
         VALUES (1, 5, '[2024-12-01,2024-12-03)') RETURNING rental_id, customer_id) \
     INSERT INTO payment (customer_id, rental_id, amount, paid_on) \
     SELECT customer_id, rental_id, 4.99, '2024-12-01' FROM rented RETURNING rental_id, amount",
    "DELETE FROM payment WHERE amount > 4.98 AND customer_id < 20 RETURNING payment_id",
    "DELETE FROM customer WHERE email = 'user11@example.org' RETURNING full_name",
    "SELECT what, count(*) FROM history GROUP BY what ORDER BY what",
];

/// What stays refused, by which SQLSTATE.
const REFUSED: [(&str, &str); 5] = [
    (
        "INSERT INTO customer (store_id, first_name, last_name, address_id) \
         VALUES (9, 'a', 'b', 1)",
        "23503",
    ),
    (
        "INSERT INTO payment (customer_id, paid_on) VALUES (1, '2024-01-01')",
        "23502",
    ),
    (
        "INSERT INTO payment (customer_id, amount, paid_on) VALUES (1, 1, '2031-01-01')",
        "23514",
    ),
    ("UPDATE customer SET full_name = 'x'", "428C9"),
    ("DELETE FROM address WHERE address_id = 41", "23503"),
];

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(Options::preloaded().set("rekey.worker = off")))
}

fn database(name: &str) -> (Database<'static>, Client) {
    let database = cluster().database(name);
    let mut admin = database.connect();
    admin.run("SELECT rekey.create_key('pii')");
    admin.run(SCHEMA);
    admin.run(VIEWS);
    (database, admin)
}

/// Seals the three columns, and puts a view in the place of each table.
fn seal(admin: &mut Client) {
    admin.run("DROP VIEW customer_list, sales_by_store");
    for (table, column, key, of) in [
        ("customer", "email", "customer_id", "text"),
        ("address", "phone", "address_id", "text"),
        ("payment", "amount", "payment_id", "numeric"),
    ] {
        let context = format!("rekey.context('{table}.{column}', {key}::text)");
        let not_null = if table == "payment" {
            "ALTER sealed SET NOT NULL,"
        } else {
            ""
        };
        admin.run(&format!(
            "ALTER TABLE {table} DISABLE TRIGGER USER;
             ALTER TABLE {table} ADD sealed bytea;
             UPDATE {table} SET sealed = encrypt_col({column}, 'pii', {context});
             ALTER TABLE {table} {not_null} DROP {column};
             ALTER TABLE {table} RENAME sealed TO {column};
             ALTER TABLE {table} ENABLE TRIGGER USER;
             ALTER TABLE {table} RENAME TO {table}_sealed;
             SELECT rekey.register_column('{table}_sealed', '{column}', $${context}$$);
             SELECT rekey.create_view('{table}_sealed', '{table}', 'pii',
                 columns => '{{\"{column}\": {{\"type\": \"{of}\"}}}}')"
        ));
    }
    admin.run(VIEWS);
}

fn answers(admin: &mut Client, questions: &[&str]) -> Vec<Vec<Vec<Option<String>>>> {
    questions.iter().map(|sql| admin.rows(sql)).collect()
}

/// Every answer, of the queries, the changes and the queries again.
fn all_answers(admin: &mut Client) -> Vec<Vec<Vec<Option<String>>>> {
    let mut all = answers(admin, &QUERIES);
    all.extend(answers(admin, &CHANGES));
    for (sql, code) in REFUSED {
        admin.fail(sql, code);
    }
    all.extend(answers(admin, &QUERIES));
    all
}

fn compare(plain: &[Vec<Vec<Option<String>>>], sealed: &[Vec<Vec<Option<String>>>]) {
    let questions = QUERIES.iter().chain(&CHANGES).chain(&QUERIES);
    for ((before, after), sql) in plain.iter().zip(sealed).zip(questions) {
        assert!(
            !before.is_empty(),
            "a question without an answer shows nothing: {sql}"
        );
        assert_eq!(before, after, "{sql}");
    }
    assert_eq!(plain.len(), sealed.len());
}

#[test]
fn sealing_three_columns_breaks_none_of_the_queries() {
    let (_, mut plain) = database("plain");
    let (_, mut sealed) = database("sealed");
    seal(&mut sealed);
    assert!(sealed.truth(
        "SELECT bool_and(rekey.is_envelope(amount)) AND count(*) = 300 FROM payment_sealed"
    ));
    compare(&all_answers(&mut plain), &all_answers(&mut sealed));
}

#[test]
fn nor_does_a_rotation_in_the_middle() {
    let (_, mut plain) = database("plain_2");
    let (_, mut sealed) = database("rotated");
    seal(&mut sealed);
    sealed.run("SELECT rotate_key('pii')");
    compare(&all_answers(&mut plain), &all_answers(&mut sealed));
    sealed.run("CALL rekey.reencrypt()");
    assert_eq!(
        sealed.number("SELECT count(*) FROM rekey.slots WHERE state = 'drained'"),
        1
    );
    assert_eq!(
        answers(&mut plain, &QUERIES),
        answers(&mut sealed, &QUERIES)
    );
    // The worker's updates are not the application's: no trigger fired.
    let history = "SELECT count(*) FROM history";
    assert_eq!(plain.number(history), sealed.number(history));
}
