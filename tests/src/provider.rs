//! Servers whose root keys come from a provider: for the tests of examples/root-key/.
//!
//! `make test-providers` puts the providers' programs into the folder `REKEY_PROVIDERS`
//! (scripts/providers.sh). Everything that a test starts of them runs on this machine, as the user
//! who owns the servers, and ends with the test.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::cluster::{as_server, run, signal};
use crate::{Ask, Cluster, Options, wait_until};

/// Opens every row that [`Served`] has sealed.
pub const OPEN: &str = "SELECT decrypt_col(c) FROM t ORDER BY 1";

/// Where `make test-providers` has put these programs (`bin/NAME`) or libraries (`lib/NAME`), or
/// None after a line that says what is not tried.
pub fn fetched<const N: usize>(test: &str, names: [&str; N]) -> Option<[PathBuf; N]> {
    let folder = std::env::var_os("REKEY_PROVIDERS").map(PathBuf::from);
    let files = folder.map(|folder| names.map(|name| folder.join(name)));
    let files = files.filter(|files| files.iter().all(|file| file.exists()));
    if files.is_none() {
        eprintln!("skipped: {test} needs {names:?} in REKEY_PROVIDERS (make test-providers)");
    }
    files
}

/// A file of examples/root-key/.
pub fn example(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/root-key");
    folder.join(name)
}

/// A keyring with one root key more, as new-key.sh makes it, and that key's id.
pub fn one_key_more(keyring: &Path) -> (Vec<u8>, String) {
    let more = run(Command::new(example("new-key.sh")).arg(keyring)).stdout;
    let text = String::from_utf8_lossy(&more);
    let id = text.rsplit("\"id\":\"").next().expect("the last id")[..32].to_owned();
    (more, id)
}

/// The first key of a keyring, in hex: what must be in no log.
pub fn secret_of(keyring: &[u8]) -> String {
    let text = String::from_utf8_lossy(keyring);
    let words = text.split('"').find(|word| word.len() == 64);
    words.expect("a key in the keyring").to_owned()
}

/// Ports of this machine. They are free again when this returns; nothing else here takes them.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    listeners.map(|listener| listener.local_addr().expect("its number").port())
}

/// A provider's process, killed when dropped.
#[derive(Debug)]
pub struct Service(Child);

impl Service {
    /// Starts it, and waits until it answers.
    pub fn start(command: &mut Command, answers: impl FnMut() -> bool) -> Service {
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let service = Service(command.spawn().expect("the provider's program"));
        wait_until("the provider answers", answers);
        service
    }

    /// Lets it hang: connections are accepted, and nothing is answered.
    pub fn freeze(&self) {
        signal("STOP", &self.0.id().to_string());
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal("CONT", &self.0.id().to_string());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server with one sealed row, whose keyring file has moved to where no setting points.
#[derive(Debug)]
pub struct Served {
    /// The server.
    pub cluster: Cluster,
    /// The keyring, for the provider to have it.
    pub keyring: PathBuf,
}

impl Served {
    /// With a database `app`, a key `pii` and the row `one`.
    pub fn start() -> Served {
        let cluster = Cluster::start(Options::unloaded());
        cluster.database("app").connect().run(
            "SELECT rekey.create_key('pii');
             CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
        );
        let keyring = cluster.dir().join("moved.json");
        fs::rename(cluster.root_key_file(), &keyring).expect("the keyring moved");
        Served { cluster, keyring }
    }

    /// Gets its root keys from an example with these variables set, from its next start on.
    pub fn use_example(&self, name: &str, variables: &str) {
        let script = fs::read(example(name)).expect("the example");
        let path = self.cluster.dir().join(name);
        self.cluster.write_file(&path, &script, 0o700);
        self.cluster.append(&format!(
            "rekey.root_key_file = ''\nrekey.root_key_command = '{variables} {}'",
            path.display()
        ));
    }

    /// Writes a file that the server's user alone reads, and returns its path.
    pub fn private(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.cluster.dir().join(name);
        self.cluster.write_file(&path, content.as_ref(), 0o600);
        path.display().to_string()
    }

    /// A session that has to ask the provider, unless the server did at its start.
    pub fn connect(&self) -> postgres::Client {
        self.cluster.connect("app")
    }

    /// A program that runs as the server's user, in the cluster's folder.
    pub fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = as_server(program);
        command
            .env("HOME", self.cluster.dir())
            .current_dir(self.cluster.dir());
        command
    }

    /// During an outage: a session that holds the root key seals, rotates and opens; a new one, and
    /// a reload, get SQLSTATE `code` and what `said`. Then `mend` ends the outage, and the session
    /// that was refused opens, without a restart.
    pub fn outlives(
        &self,
        warm: &mut postgres::Client,
        (code, said): (&str, &str),
        mend: impl FnOnce(),
    ) {
        let rows = warm.column(OPEN);
        let reload = "SELECT rekey.reload_root_keys()";
        warm.refuse(reload, code).names(said);
        warm.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('more', 'pii'))");
        assert_eq!(warm.column(OPEN).len(), rows.len() + 1);
        let mut cold = self.connect();
        cold.refuse(OPEN, code).names(said);
        assert!(!cold.truth("SELECT rekey.ready()"));
        mend();
        cold.run(reload);
        assert_eq!(cold.column(OPEN).len(), rows.len() + 1);
        assert_eq!(self.connect().column(OPEN).len(), rows.len() + 1);
    }

    /// Rotates to the root key that the provider has beside the old one, which then retires.
    pub fn rotates_to(&self, new: &str) {
        let mut client = self.connect();
        let old = client.text("SELECT root_id FROM rekey.root_keys");
        assert_ne!(old, new);
        client.run(&format!("SELECT rekey.rotate_root_key('{new}')"));
        client.run(&format!(
            "SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('rotated', 'pii'));
             SELECT rekey.retire_root_key('{old}')"
        ));
        let rows = client.column(OPEN);
        assert_eq!(self.connect().column(OPEN), rows);
    }
}
