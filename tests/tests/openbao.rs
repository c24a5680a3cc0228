//! The scripts of examples/root-key/ against a real OpenBao: root keys from its KV and transit
//! engines, a rotation there, every kind of outage, a revoked token.
//!
//! `make test-providers` runs it. Without OpenBao's program it prints that it was skipped. The
//! server keeps its data in the cluster's folder, and is sealed and unsealed as one in production.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rekey_tests::cluster::{give_to_server, run, runs};
use rekey_tests::provider::{OPEN, Served, Service, fetched, free_ports, one_key_more, secret_of};
use rekey_tests::{Ask, wait_until};

const KV_POLICY: &str = "path \"secret/data/pg_rekey\" { capabilities = [\"read\"] }";
const TRANSIT_POLICY: &str = "path \"transit/decrypt/pg_rekey\" { capabilities = [\"update\"] }";

/// A server of OpenBao, initialized and unsealed, with the KV engine at `secret/`.
struct Bao<'a> {
    served: &'a Served,
    program: PathBuf,
    address: String,
    unseal_key: String,
    root_token: String,
    server: Option<Service>,
}

impl<'a> Bao<'a> {
    fn start(program: PathBuf, served: &'a Served) -> Bao<'a> {
        let data = served.cluster.dir().join("bao");
        fs::create_dir(&data).expect("OpenBao's folder");
        give_to_server(&data);
        let [address, peers] = free_ports();
        served.private(
            "bao.hcl",
            format!(
                "storage \"raft\" {{\n path = \"{}\"\n node_id = \"one\"\n \
                 performance_multiplier = 1\n max_entry_size = 4194304\n}}\n\
                 listener \"tcp\" {{\n address = \"127.0.0.1:{address}\"\n \
                 cluster_address = \"127.0.0.1:{peers}\"\n tls_disable = true\n}}\n\
                 api_addr = \"http://127.0.0.1:{address}\"\n\
                 cluster_addr = \"http://127.0.0.1:{peers}\"\n",
                data.display()
            ),
        );
        let mut bao = Bao {
            served,
            program,
            address: format!("127.0.0.1:{address}"),
            unseal_key: String::new(),
            root_token: String::new(),
            server: None,
        };
        bao.boot();
        let init = ["-key-shares=1", "-key-threshold=1", "-format=json"];
        let init = bao.run(&[&["operator", "init"], &init[..]].concat());
        let init: serde_json::Value = serde_json::from_str(&init).expect("JSON");
        let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
        bao.unseal_key = text(&init["unseal_keys_b64"][0]);
        bao.root_token = text(&init["root_token"]);
        bao.unseal();
        bao.run(&["secrets", "enable", "-path=secret", "kv-v2"]);
        bao
    }

    /// Starts it; a server that was initialized before is sealed then.
    fn boot(&mut self) {
        let mut server = self.command();
        server.args(["server", "-config=bao.hcl"]);
        let answers = || {
            let status = self.command().arg("status").output().expect("a status");
            matches!(status.status.code(), Some(0 | 2))
        };
        self.server = Some(Service::start(&mut server, answers));
    }

    fn unseal(&self) {
        self.run(&["operator", "unseal", &self.unseal_key]);
        wait_until("OpenBao serves", || {
            let lookup = self.command().args(["token", "lookup"]).output();
            lookup.expect("an answer").status.success()
        });
    }

    fn command(&self) -> Command {
        let mut command = self.served.program(&self.program);
        command
            .env("BAO_ADDR", format!("http://{}", self.address))
            .env("BAO_TOKEN", &self.root_token);
        command
    }

    fn run(&self, args: &[&str]) -> String {
        let output = run(self.command().args(args));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn service(&self) -> &Service {
        self.server.as_ref().expect("a running server")
    }

    /// A secret of the KV engine, whose fields are those of a JSON file.
    fn put(&self, file: &Path) {
        let file = format!("@{}", file.display());
        let put = ["kv", "put", "-mount=secret", "pg_rekey", &file];
        wait_until("the KV engine is set up", || {
            let put = self.command().args(put).output();
            put.expect("an answer").status.success()
        });
    }

    /// What the server's token may do from now on.
    fn allow(&self, policy: &str) {
        let rules = self.served.private("policy.hcl", policy);
        self.run(&["policy", "write", "pg_rekey", &rules]);
    }

    /// Puts a fresh token with the example's policy in its place, and returns it.
    fn new_token(&self) -> String {
        let token = self.run(&["token", "create", "-policy=pg_rekey", "-field=token"]);
        self.served.private("token", &token);
        token
    }

    /// Sets the example as the command, under a token with the policy that it documents.
    fn use_example(&self, name: &str, policy: &str, more: &str) -> String {
        self.allow(policy);
        let token = self.new_token();
        let token_file = self.served.cluster.dir().join("token");
        let variables = format!(
            "BAO_ADDR=http://{} BAO_TOKEN_FILE={} {more}",
            self.address,
            token_file.display()
        );
        self.served.use_example(name, &variables);
        token
    }
}

#[test]
fn the_kv_engine_serves_rotates_and_goes_away() {
    let Some([program]) = fetched("the KV engine", ["bin/bao"]) else {
        return;
    };
    let served = Served::start();
    let mut bao = Bao::start(program, &served);
    let cluster = &served.cluster;
    bao.put(&served.keyring);
    let token = bao.use_example("openbao-kv.sh", KV_POLICY, "");
    cluster.append("shared_preload_libraries = 'pg_rekey'");
    cluster.restart("fast");
    let mut client = served.connect();
    assert_eq!(client.text(OPEN), "one");
    assert!(client.truth("SELECT rekey.ready()"));

    let (more, new) = one_key_more(&served.keyring);
    bao.put(served.private("more.json", &more).as_ref());
    let old = client.text("SELECT root_id FROM rekey.root_keys");
    assert_eq!(
        client.text(&format!("SELECT rekey.rotate_root_key('{new}')")),
        new
    );
    client.run(&format!(
        "SELECT rotate_key('pii'); SELECT rekey.retire_root_key('{old}')"
    ));
    cluster.restart("fast");
    let mut client = served.connect();
    assert_eq!(client.text(OPEN), "one");

    // An outage: what holds the root keys goes on, what does not says so.
    bao.server = None;
    client.run("SELECT rotate_key('pii'); INSERT INTO t VALUES (encrypt_col('two', 'pii'))");
    assert_eq!(client.column(OPEN), ["one", "two"]);
    client.refuse("SELECT rekey.reload_root_keys()", "58000");
    cluster.restart("fast");
    served.connect().refuse(OPEN, "58000");
    bao.boot();
    // It comes back sealed.
    served.connect().refuse(OPEN, "58000");
    bao.unseal();
    assert_eq!(served.connect().column(OPEN), ["one", "two"]);
    bao.run(&["token", "revoke", &token]);
    served.connect().refuse(OPEN, "58000");
    let again = bao.new_token();
    assert_eq!(served.connect().column(OPEN), ["one", "two"]);

    let log = cluster.log();
    assert!(log.contains("root key command: curl: "), "{log}");
    for secret in [&token, &again, &secret_of(&more)] {
        assert!(!log.contains(secret.as_str()), "a secret is in the log");
    }
}

#[test]
fn the_transit_engine_opens_the_keyring_and_can_refuse() {
    let Some([program]) = fetched("the transit engine", ["bin/bao"]) else {
        return;
    };
    let served = Served::start();
    let bao = Bao::start(program, &served);
    let cluster = &served.cluster;
    bao.run(&["secrets", "enable", "transit"]);
    bao.run(&["write", "-f", "transit/keys/pg_rekey"]);
    let plaintext = rekey_tests::bytes::base64(&fs::read(&served.keyring).expect("the keyring"));
    let encrypted = bao.run(&[
        "write",
        "-field=ciphertext",
        "transit/encrypt/pg_rekey",
        &format!("plaintext={plaintext}"),
    ]);
    let file = served.private("keyring.transit", format!("{encrypted}\n"));
    let variables = format!("BAO_KEYRING={file}");
    let token = bao.use_example("openbao-transit.sh", TRANSIT_POLICY, &variables);
    cluster.append("shared_preload_libraries = 'pg_rekey'");
    cluster.restart("fast");
    let mut client = served.connect();
    assert_eq!(client.text(OPEN), "one");
    bao.run(&["token", "revoke", &token]);
    client.refuse("SELECT rekey.reload_root_keys()", "58000");
    assert_eq!(client.text(OPEN), "one");
    cluster.restart("fast");
    served.connect().refuse(OPEN, "58000");
}

/// What is done to OpenBao, the error that follows, and how it is well again.
type Outage = (
    &'static str,
    fn(&mut Bao),
    (&'static str, &'static str),
    fn(&mut Bao),
);

const OUTAGES: [Outage; 8] = [
    (
        "down, and sealed when it comes back",
        |bao| bao.server = None,
        ("58000", "status 7"),
        |bao| {
            bao.boot();
            bao.unseal();
        },
    ),
    (
        "sealed",
        |bao| {
            bao.run(&["operator", "seal"]);
        },
        ("58000", "status 22"),
        |bao| bao.unseal(),
    ),
    (
        "wrong token",
        |bao| {
            bao.served.private("token", "not a token");
        },
        ("58000", "status 22"),
        |bao| {
            bao.new_token();
        },
    ),
    (
        "a policy without the secret",
        |bao| bao.allow(TRANSIT_POLICY),
        ("58000", "status 22"),
        |bao| bao.allow(KV_POLICY),
    ),
    (
        "no such secret",
        |bao| {
            bao.run(&["kv", "metadata", "delete", "-mount=secret", "pg_rekey"]);
        },
        ("58000", "status 22"),
        |bao| bao.put(&bao.served.keyring),
    ),
    (
        "garbage",
        |bao| {
            bao.put(
                bao.served
                    .private("other.json", "{\"note\":\"x\"}")
                    .as_ref(),
            )
        },
        ("F0000", "rekey.root_key_command printed is not valid"),
        |bao| bao.put(&bao.served.keyring),
    ),
    (
        "an answer of more than a megabyte",
        |bao| {
            let part = "x".repeat(400_000);
            let big = format!("{{\"a\":\"{part}\",\"b\":\"{part}\",\"c\":\"{part}\"}}");
            bao.put(bao.served.private("big.json", big).as_ref());
        },
        ("F0000", "more than 1048576 bytes"),
        |bao| bao.put(&bao.served.keyring),
    ),
    (
        "hanging",
        |bao| bao.service().freeze(),
        ("58000", "2000 ms"),
        |bao| bao.service().thaw(),
    ),
];

#[test]
fn every_outage_of_openbao_spares_who_holds_the_keys_and_ends_without_a_restart() {
    let Some([program]) = fetched("outages of OpenBao", ["bin/bao"]) else {
        return;
    };
    let served = Served::start();
    let mut bao = Bao::start(program, &served);
    bao.put(&served.keyring);
    bao.use_example("openbao-kv.sh", KV_POLICY, "");
    served
        .cluster
        .append("rekey.root_key_command_timeout = '2s'");
    served.cluster.restart("fast");
    let mut warm = served.connect();
    assert_eq!(warm.text(OPEN), "one");
    for (outage, begin, refusal, end) in OUTAGES {
        eprintln!("OpenBao: {outage}");
        begin(&mut bao);
        served.outlives(&mut warm, refusal, || end(&mut bao));
    }
}

#[test]
fn a_slow_openbao_is_waited_for() {
    let Some([program]) = fetched("a slow OpenBao", ["bin/bao"]) else {
        return;
    };
    let served = Served::start();
    let bao = Bao::start(program, &served);
    bao.put(&served.keyring);
    bao.use_example("openbao-kv.sh", KV_POLICY, "");
    served.cluster.restart("fast");
    bao.service().freeze();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let question = format!("{}/v1/secret", bao.address);
            let mut asked = None;
            wait_until("the question is a second old", || {
                if asked.is_none() && runs(&question) {
                    asked = Some(Instant::now());
                }
                asked.is_some_and(|asked| asked.elapsed() > Duration::from_secs(1))
            });
            bao.service().thaw();
        });
        assert_eq!(served.connect().text(OPEN), "one");
    });
}
