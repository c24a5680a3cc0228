//! Questions in SQL: every cell as text, every refusal with its SQLSTATE, DETAIL and HINT.
//!
//! [`Ask`] is implemented for the client of the `postgres` crate. It uses the simple protocol, so
//! that a value of any type arrives as the text that psql would show. [`Ask::refuse`] is for the
//! extension's own errors, whose style it checks as well; [`Ask::fail`] is for PostgreSQL's.

use postgres::error::DbError;
use postgres::{Client, Error, SimpleQueryMessage};

/// What the server said when it refused a statement.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// SQLSTATE, five characters.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// DETAIL, empty if there is none.
    pub detail: String,
    /// HINT, empty if there is none.
    pub hint: String,
}

impl Refusal {
    /// Of a client's error; panics if the server did not say it.
    pub fn of(error: &Error, sql: &str) -> Refusal {
        let Some(db) = error.as_db_error() else {
            panic!("not an answer of the server to {}: {error}", brief(sql));
        };
        Refusal::of_db(db)
    }

    fn of_db(db: &DbError) -> Refusal {
        Refusal {
            code: db.code().code().to_owned(),
            message: db.message().to_owned(),
            detail: db.detail().unwrap_or_default().to_owned(),
            hint: db.hint().unwrap_or_default().to_owned(),
        }
    }

    /// All the text that reached the client.
    pub fn text(&self) -> String {
        format!("{}\n{}\n{}", self.message, self.detail, self.hint)
    }

    /// Asserts that the text names `what`.
    pub fn names(self, what: &str) -> Refusal {
        assert!(
            self.text().contains(what),
            "the error does not name {what:?}: {self:?}"
        );
        self
    }

    /// Asserts that the HINT names `what`.
    pub fn hints(self, what: &str) -> Refusal {
        assert!(
            self.hint.contains(what),
            "the HINT does not name {what:?}: {self:?}"
        );
        self
    }
}

/// Plain questions to a server.
pub trait Ask {
    /// Runs one or more statements.
    fn run(&mut self, sql: &str);
    /// All rows of the last statement that returns any, as text.
    fn rows(&mut self, sql: &str) -> Vec<Vec<Option<String>>>;
    /// The one cell of the one row.
    fn cell(&mut self, sql: &str) -> Option<String>;
    /// The one cell, which must not be NULL.
    fn text(&mut self, sql: &str) -> String;
    /// The one cell as a number.
    fn number(&mut self, sql: &str) -> i64;
    /// The one cell as a boolean.
    fn truth(&mut self, sql: &str) -> bool;
    /// The first column of all rows, none of it NULL.
    fn column(&mut self, sql: &str) -> Vec<String>;
    /// Tries statements that may be refused.
    fn attempt(&mut self, sql: &str) -> Result<(), Refusal>;
    /// Asserts that the statement fails with SQLSTATE `code`, whoever raises it.
    fn fail(&mut self, sql: &str, code: &str) -> Refusal;
    /// Asserts an error of the extension: SQLSTATE `code`, and the style of design §11.
    fn refuse(&mut self, sql: &str, code: &str) -> Refusal;
}

impl Ask for Client {
    fn run(&mut self, sql: &str) {
        if let Err(error) = self.batch_execute(sql) {
            panic!("{} failed: {}", brief(sql), explain(&error));
        }
    }

    fn rows(&mut self, sql: &str) -> Vec<Vec<Option<String>>> {
        let messages = match self.simple_query(sql) {
            Ok(messages) => messages,
            Err(error) => panic!("{} failed: {}", brief(sql), explain(&error)),
        };
        let mut rows = Vec::new();
        for message in messages {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push(
                    (0..row.len())
                        .map(|i| row.get(i).map(str::to_owned))
                        .collect(),
                );
            }
        }
        rows
    }

    fn cell(&mut self, sql: &str) -> Option<String> {
        let mut rows = self.rows(sql);
        assert_eq!(rows.len(), 1, "{} gave {} rows", brief(sql), rows.len());
        let mut row = rows.remove(0);
        assert_eq!(row.len(), 1, "{} gave {} columns", brief(sql), row.len());
        row.remove(0)
    }

    fn text(&mut self, sql: &str) -> String {
        self.cell(sql)
            .unwrap_or_else(|| panic!("{} gave NULL", brief(sql)))
    }

    fn number(&mut self, sql: &str) -> i64 {
        let text = self.text(sql);
        text.parse()
            .unwrap_or_else(|_| panic!("{} gave {text}, not a number", brief(sql)))
    }

    fn truth(&mut self, sql: &str) -> bool {
        match self.text(sql).as_str() {
            "t" => true,
            "f" => false,
            other => panic!("{} gave {other}, not a boolean", brief(sql)),
        }
    }

    fn column(&mut self, sql: &str) -> Vec<String> {
        let rows = self.rows(sql);
        rows.into_iter()
            .map(|row| {
                row.into_iter()
                    .next()
                    .flatten()
                    .expect("a column without NULL")
            })
            .collect()
    }

    fn attempt(&mut self, sql: &str) -> Result<(), Refusal> {
        self.batch_execute(sql)
            .map_err(|error| Refusal::of(&error, sql))
    }

    #[track_caller]
    fn fail(&mut self, sql: &str, code: &str) -> Refusal {
        let Err(refusal) = self.attempt(sql) else {
            panic!("{} succeeded, expected SQLSTATE {code}", brief(sql));
        };
        assert_eq!(refusal.code, code, "{} gave {refusal:?}", brief(sql));
        refusal
    }

    #[track_caller]
    fn refuse(&mut self, sql: &str, code: &str) -> Refusal {
        let refusal = self.fail(sql, code);
        let first = refusal.message.chars().next().expect("a primary message");
        assert!(
            !first.is_uppercase(),
            "not a lower-case primary message: {refusal:?}"
        );
        assert!(
            !refusal.message.contains('\n'),
            "more than one line: {refusal:?}"
        );
        assert!(
            !refusal.detail.is_empty(),
            "no DETAIL: {} gave {refusal:?}",
            brief(sql)
        );
        assert!(
            !refusal.hint.is_empty(),
            "no HINT: {} gave {refusal:?}",
            brief(sql)
        );
        refusal
    }
}

fn explain(error: &Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{:?}", Refusal::of_db(db)),
        None => error.to_string(),
    }
}

/// A statement short enough for a failure's message.
fn brief(sql: &str) -> String {
    let mut text: String = sql.chars().take(300).collect();
    if text.len() < sql.len() {
        text.push('…');
    }
    text
}
