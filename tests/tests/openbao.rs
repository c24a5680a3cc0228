//! The scripts of examples/root-key/ against a real OpenBao: root keys from its KV and transit
//! engines, a rotation there, an outage, a revoked token.
//!
//! `make test-providers` runs it. Without REKEY_BAO, the path of the `bao` program, it prints that it
//! was skipped. OpenBao runs in its development mode, in memory, on a port of this machine.

use std::ffi::OsString;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rekey_tests::cluster::{as_server, run};
use rekey_tests::{Ask, Cluster, Options, wait_until};

const OPEN: &str = "SELECT decrypt_col(c) FROM t";
const TOKEN: &str = "the-root-token-of-a-test";

/// A development server of OpenBao, killed when dropped.
struct Bao {
    program: OsString,
    address: String,
    home: PathBuf,
    server: Option<Child>,
}

impl Bao {
    fn start(program: OsString, home: &Path) -> Bao {
        // The port is free again when the listener is dropped; nothing else here takes it.
        let port = TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("its number");
        let mut bao = Bao {
            program,
            address: port.to_string(),
            home: home.to_owned(),
            server: None,
        };
        bao.boot();
        bao
    }

    fn boot(&mut self) {
        let server = self
            .command()
            .args(["server", "-dev", "-dev-no-store-token"])
            .arg(format!("-dev-root-token-id={TOKEN}"))
            .arg(format!("-dev-listen-address={}", self.address))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.server = Some(server.expect("OpenBao"));
        wait_until("OpenBao answers", || {
            TcpStream::connect(&self.address).is_ok()
                && self
                    .command()
                    .arg("status")
                    .output()
                    .is_ok_and(|o| o.status.success())
        });
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().expect("OpenBao killed");
            server.wait().expect("its end");
        }
    }

    fn command(&self) -> Command {
        let mut command = as_server(&self.program);
        command
            .env("BAO_ADDR", format!("http://{}", self.address))
            .env("BAO_TOKEN", TOKEN)
            .env("HOME", &self.home);
        command
    }

    fn run(&self, args: &[&str]) -> String {
        let output = run(self.command().args(args));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Bao {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The program, or None after a line that says what is not tried.
fn program(test: &str) -> Option<OsString> {
    let program = std::env::var_os("REKEY_BAO");
    if program.is_none() {
        eprintln!(
            "skipped: {test} needs REKEY_BAO, the path of OpenBao's program (make test-providers)"
        );
    }
    program
}

/// A server with a sealed row whose keyring file is going to move to OpenBao.
fn cluster() -> (Cluster, PathBuf) {
    let cluster = Cluster::start(Options::unloaded());
    cluster.database("app").connect().run(
        "SELECT rekey.create_key('pii');
         CREATE TABLE t AS SELECT encrypt_col('one', 'pii') AS c",
    );
    let keyring = cluster.dir().join("moved.json");
    fs::rename(cluster.root_key_file(), &keyring).expect("the keyring moved");
    (cluster, keyring)
}

/// Sets the example as the command, under a token with the policy that it documents.
fn use_example(cluster: &Cluster, bao: &Bao, name: &str, policy: &str, settings: &str) -> String {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/root-key");
    let script = fs::read(examples.join(name)).expect("the example");
    let path = cluster.dir().join(name);
    cluster.write_file(&path, &script, 0o700);
    let rules = cluster.dir().join("policy.hcl");
    cluster.write_file(&rules, policy.as_bytes(), 0o600);
    bao.run(&["policy", "write", "pg_rekey", &rules.display().to_string()]);
    let token = bao.run(&["token", "create", "-policy=pg_rekey", "-field=token"]);
    let token_file = cluster.dir().join("token");
    cluster.write_file(&token_file, token.as_bytes(), 0o600);
    cluster.append("rekey.root_key_file = ''");
    cluster.append(&format!(
        "rekey.root_key_command = 'BAO_ADDR=http://{} BAO_TOKEN_FILE={} {settings} {}'",
        bao.address,
        token_file.display(),
        path.display()
    ));
    cluster.append("shared_preload_libraries = 'pg_rekey'");
    cluster.restart("fast");
    token
}

#[test]
fn the_kv_engine_serves_rotates_and_goes_away() {
    let Some(program) = program("the KV engine") else {
        return;
    };
    let (cluster, keyring) = cluster();
    let mut bao = Bao::start(program, cluster.dir());
    let put = |bao: &Bao, keyring: &Path| {
        bao.run(&[
            "kv",
            "put",
            "-mount=secret",
            "pg_rekey",
            &format!("@{}", keyring.display()),
        ]);
    };
    put(&bao, &keyring);
    let policy = "path \"secret/data/pg_rekey\" { capabilities = [\"read\"] }";
    let token = use_example(&cluster, &bao, "openbao-kv.sh", policy, "");
    let mut client = cluster.connect("app");
    assert_eq!(client.text(OPEN), "one");
    assert!(client.truth("SELECT rekey.ready()"));

    let new_key = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/root-key/new-key.sh");
    let more = run(Command::new(new_key).arg(&keyring)).stdout;
    let more_file = cluster.dir().join("more.json");
    cluster.write_file(&more_file, &more, 0o600);
    put(&bao, &more_file);
    let ids = String::from_utf8_lossy(&more).into_owned();
    let new = ids.rsplit("\"id\":\"").next().expect("the last id")[..32].to_owned();
    let old = client.text("SELECT root_id FROM rekey.root_keys");
    assert_eq!(
        client.text(&format!("SELECT rekey.rotate_root_key('{new}')")),
        new
    );
    client.run(&format!(
        "SELECT rotate_key('pii'); SELECT rekey.retire_root_key('{old}')"
    ));
    cluster.restart("fast");
    let mut client = cluster.connect("app");
    assert_eq!(client.text(OPEN), "one");

    // An outage: what holds the root keys goes on, what does not says so.
    bao.stop();
    client.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    assert_eq!(client.column(&format!("{OPEN} ORDER BY 1")), ["one", "two"]);
    client.refuse("SELECT rekey.reload_root_keys()", "58000");
    cluster.restart("fast");
    cluster.connect("app").refuse(OPEN, "58000");
    bao.boot();
    let rules = cluster.dir().join("policy.hcl");
    bao.run(&["policy", "write", "pg_rekey", &rules.display().to_string()]);
    put(&bao, &more_file);
    // A development server forgets its tokens.
    cluster.connect("app").refuse(OPEN, "58000");
    let again = bao.run(&["token", "create", "-policy=pg_rekey", "-field=token"]);
    cluster.write_file(&cluster.dir().join("token"), again.as_bytes(), 0o600);
    assert_eq!(
        cluster.connect("app").column(&format!("{OPEN} ORDER BY 1")),
        ["one", "two"]
    );

    let log = cluster.log();
    assert!(log.contains("root key command: curl: "), "{log}");
    for secret in [
        &token,
        &again,
        &ids[ids.find("\"key\":\"").expect("a key") + 7..][..64].to_owned(),
    ] {
        assert!(!log.contains(secret.as_str()), "a secret is in the log");
    }
}

#[test]
fn the_transit_engine_opens_the_keyring_and_can_refuse() {
    let Some(program) = program("the transit engine") else {
        return;
    };
    let (cluster, keyring) = cluster();
    let bao = Bao::start(program, cluster.dir());
    bao.run(&["secrets", "enable", "transit"]);
    bao.run(&["write", "-f", "transit/keys/pg_rekey"]);
    let plaintext = rekey_tests::bytes::base64(&fs::read(&keyring).expect("the keyring"));
    let encrypted = bao.run(&[
        "write",
        "-field=ciphertext",
        "transit/encrypt/pg_rekey",
        &format!("plaintext={plaintext}"),
    ]);
    let file = cluster.dir().join("keyring.transit");
    cluster.write_file(&file, format!("{encrypted}\n").as_bytes(), 0o600);
    let policy = "path \"transit/decrypt/pg_rekey\" { capabilities = [\"update\"] }";
    let settings = format!("BAO_KEYRING={}", file.display());
    let token = use_example(&cluster, &bao, "openbao-transit.sh", policy, &settings);
    let mut client = cluster.connect("app");
    assert_eq!(client.text(OPEN), "one");
    bao.run(&["token", "revoke", &token]);
    client.refuse("SELECT rekey.reload_root_keys()", "58000");
    assert_eq!(client.text(OPEN), "one");
    cluster.restart("fast");
    cluster.connect("app").refuse(OPEN, "58000");
}
