//! Customers with a sealed email, over sqlx: added, found by email, changed.
//! `shop migrate` runs the migrations; `shop` tries everything once for each line it reads, and
//! `make test-examples` rotates the keys between two lines. Connects as the PG* variables say.
//!
//! Works through PgBouncer in transaction mode: no statement is kept on the server
//! (`persistent(false)`), and each runs in a transaction, since sqlx prepares and executes in two
//! round trips.

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{FromRow, PgPool, Result};

#[derive(FromRow, Debug, PartialEq)]
struct Customer {
    name: String,
    email: String,
}

async fn add(pool: &PgPool, name: &str, email: &str) -> Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query(
        "INSERT INTO customer (id, name, email, email_fp)
         SELECT id, $1, encrypt_col($2, 'pii', rekey.context('customer.email', id::text)),
                fingerprint_col(lower($2), 'email_lookup')
           FROM gen_random_uuid() AS id",
    )
    .persistent(false)
    .bind(name)
    .bind(email)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

async fn find(pool: &PgPool, email: &str) -> Result<Option<Customer>> {
    let mut tx = pool.begin().await?;
    let customer = sqlx::query_as(
        "SELECT name, decrypt_col(email, rekey.context('customer.email', id::text)) AS email
           FROM customer
          WHERE email_fp = ANY (rekey.fingerprints(lower($1), 'email_lookup'))",
    )
    .persistent(false)
    .bind(email)
    .fetch_optional(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(customer)
}

async fn change_email(pool: &PgPool, old: &str, new: &str) -> Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query(
        "UPDATE customer
            SET email = encrypt_col($2, 'pii', rekey.context('customer.email', id::text)),
                email_fp = fingerprint_col(lower($2), 'email_lookup')
          WHERE email_fp = ANY (rekey.fingerprints(lower($1), 'email_lookup'))",
    )
    .persistent(false)
    .bind(old)
    .bind(new)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // PgBouncer refuses the startup parameter extra_float_digits.
    let options = PgConnectOptions::new().extra_float_digits(None);
    let pool = PgPoolOptions::new().connect_with(options).await?;
    if std::env::args().nth(1).as_deref() == Some("migrate") {
        sqlx::migrate!().run(&pool).await?;
        return Ok(());
    }

    let mut names = Vec::new();
    for line in std::io::stdin().lines() {
        let name = line?;
        let (first, email) = (format!("{name}@first.example.org"), format!("{name}@example.org"));
        add(&pool, &name, &first).await?;
        change_email(&pool, &first, &email).await?;
        assert_eq!(find(&pool, &first).await?, None);
        names.push(name);
        for name in names.iter().cloned() {
            let email = format!("{name}@example.org");
            let found = find(&pool, &email.to_uppercase()).await?;
            assert_eq!(found, Some(Customer { name, email }));
        }
        println!("{}", names.len());
    }
    Ok(())
}
