//! The keyring command: a program that prints the keyring, in the way of `ssl_passphrase_command`.
//!
//! For key management services and HSMs. What it prints on stdout is the secret and goes nowhere
//! but into the keyring; what it prints on stderr goes to the server log, bounded. A provider that
//! is down must not be asked by every query: a process remembers for some seconds that it had no
//! answer, or no such key.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::time::{Duration, Instant};

use pgrx::{PgLogLevel, PgSqlErrorCode, ereport};
use rekey_core::cipher::RootId;
use rekey_core::root_keyring::RootKeyring;

use crate::error::{Error, Result};
use crate::ffi::{command, text};
use crate::guc;

/// Bytes of a keyring, at most: see rekey_core::root_keyring.
const MAX_BYTES: usize = 1 << 20;
/// Lines of stderr that are logged per run, and their length in bytes.
const MAX_LINES: usize = 50;
const MAX_LINE: usize = 1000;
/// How long a process does not ask again. Long enough that a pool of connections does not become
/// a flood of requests, short enough that nobody waits for the end of an outage.
const BACK_OFF: Duration = Duration::from_secs(5);
/// Unknown root ids that a process remembers. A database knows a handful.
const MAX_UNKNOWN: usize = 32;

/// What the command did not give.
enum Missed {
    /// Anything: it failed. The error's detail, and whether it was the keyring that was bad.
    All(Error),
    /// These root keys: it succeeded without them.
    Ids(Vec<RootId>),
}

thread_local! {
    static MISSED: RefCell<Option<(Instant, Missed)>> = const { RefCell::new(None) };
}

/// Forgets what was missed: the next unknown root key is asked for.
pub fn forget_misses() {
    let _ = MISSED.try_with(|missed| missed.take());
}

/// The error to give instead of a run, when the command was asked for these keys just now.
pub fn asked_lately(candidates: &[RootId]) -> Option<Error> {
    MISSED.with_borrow(|missed| {
        let (since, missed) = missed.as_ref()?;
        let left = BACK_OFF.checked_sub(since.elapsed())?;
        let again = format!(
            "It is not asked again by this session for another {} s.",
            left.as_secs() + 1
        );
        match missed {
            Missed::All(Error::Provider(detail, hint)) => {
                Some(Error::Provider(format!("{detail} {again}"), hint.clone()))
            }
            Missed::All(Error::RootKey(detail, hint)) => {
                Some(Error::RootKey(format!("{detail} {again}"), hint.clone()))
            }
            Missed::All(_) => None,
            Missed::Ids(ids) => candidates.iter().all(|id| ids.contains(id)).then(|| {
                let names: Vec<String> = candidates.iter().map(RootId::to_string).collect();
                Error::RootKey(
                    format!(
                        "The keyring of rekey.root_key_command does not hold root key {}. {again}",
                        names.join(", ")
                    ),
                    HINT_SERVE.to_string(),
                )
            }),
        }
    })
}

const HINT_SERVE: &str = "Have the command print this root key too; rekey.reload_root_keys() asks \
                          it at once.";

/// Remembers that the command succeeded without any of these keys.
pub fn remember_missing(candidates: &[RootId]) {
    MISSED.with_borrow_mut(|missed| {
        let mut ids = match missed.take() {
            Some((since, Missed::Ids(ids))) if since.elapsed() < BACK_OFF => ids,
            _ => Vec::new(),
        };
        ids.extend_from_slice(candidates);
        let excess = ids.len().saturating_sub(MAX_UNKNOWN);
        ids.drain(..excess);
        *missed = Some((Instant::now(), Missed::Ids(ids)));
    });
}

/// Runs the command and reads the keyring that it prints. A failure is remembered.
pub fn run(command: &OsStr) -> Result<RootKeyring> {
    let result = ask(command);
    if let Err(error) = &result {
        let copy = match error {
            Error::Provider(detail, hint) => Error::Provider(detail.clone(), hint.clone()),
            Error::RootKey(detail, hint) => Error::RootKey(detail.clone(), hint.clone()),
            _ => return result,
        };
        MISSED.set(Some((Instant::now(), Missed::All(copy))));
    }
    result
}

fn ask(command: &OsStr) -> Result<RootKeyring> {
    let limit = guc::root_key_command_timeout();
    let mut listener = Listener::default();
    let printed = command::output(command, limit, MAX_BYTES, |chunk| listener.hear(chunk));
    listener.finish();
    let printed = printed.map_err(|failure| explain(failure, limit))?;
    RootKeyring::parse(&printed).map_err(|cause| {
        Error::RootKey(
            format!(
                "What rekey.root_key_command printed is not valid: {}",
                cause.detail()
            ),
            "It must print the JSON keyring, and nothing else, on its standard output.".to_string(),
        )
    })
}

fn explain(failure: command::Failure, limit: Duration) -> Error {
    use command::Failure;
    let detail = match failure {
        Failure::NotStarted(error) => format!("/bin/sh could not be started: {error}."),
        Failure::Exited(127) => {
            "It exited with status 127: the shell found no such program.".into()
        }
        Failure::Exited(126) => "It exited with status 126: the program cannot be executed.".into(),
        // The shell's word for a signal that ended what it ran.
        Failure::Exited(status @ 129..=192) => {
            format!(
                "It exited with status {status}: ended by signal {}.",
                status - 128
            )
        }
        Failure::Exited(status) => format!("It exited with status {status}."),
        Failure::Signalled(number, name) => format!("It was ended by signal {number}: {name}."),
        Failure::TimedOut => format!(
            "It was killed after {} ms (rekey.root_key_command_timeout).",
            limit.as_millis()
        ),
        Failure::Unreadable(error) => format!("Its output could not be read: {error}."),
        Failure::TooMuch => {
            return Error::RootKey(
                format!("rekey.root_key_command printed more than {MAX_BYTES} bytes."),
                "A keyring is a small JSON document, and nothing else may be printed.".to_string(),
            );
        }
    };
    Error::Provider(
        detail,
        "What it printed on standard error is in the server log; try it as the server's user."
            .to_string(),
    )
}

/// Turns what the command says into lines of the server log.
#[derive(Default)]
struct Listener {
    line: Vec<u8>,
    lines: usize,
}

impl Listener {
    fn hear(&mut self, chunk: &[u8]) {
        for &byte in chunk {
            match byte {
                b'\n' => self.log(),
                _ if self.line.len() < MAX_LINE => self.line.push(byte),
                // The rest of a long line is dropped.
                _ => {}
            }
        }
    }

    fn finish(&mut self) {
        if !self.line.is_empty() {
            self.log();
        }
        if self.lines > MAX_LINES {
            server_log(&format!(
                "pg_rekey: root key command: ({} more lines)",
                self.lines - MAX_LINES
            ));
        }
    }

    fn log(&mut self) {
        self.lines += 1;
        if self.lines <= MAX_LINES {
            let line = String::from_utf8_lossy(&self.line);
            let printable = |c: char| if c.is_control() { ' ' } else { c };
            let line: String = line.chars().map(printable).collect();
            server_log(&format!("pg_rekey: root key command: {}", line.trim_end()));
        }
        self.line.clear();
    }
}

/// Never to the client: it may name accounts and hosts.
fn server_log(line: &str) {
    ereport!(
        PgLogLevel::LOG_SERVER_ONLY,
        PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
        text::message(line.to_string())
    );
}
